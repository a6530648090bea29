"""The parts of the GPU suite, in the order in which they run: the most informative first.

Data, and how a run's time is shared between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the suite.

    Attributes:
        module: its `run` takes a setting and a report.
        share: seconds of a run with the default budget; another budget is shared in the same proportions.
        limit_s: seconds that it never takes more than, however large the budget is.
        is_default: whether it runs unless others are asked for.
        about: what it finds out, for people.
    """

    module: str
    share: float
    limit_s: float = float("inf")
    is_default: bool = True
    about: str = ""


SECTIONS = {
    "ceilings": Section(
        "benchmarks.gpu.ceilings", 12, limit_s=12, about="copy, read, L2 and matmul rates; kernels compile meanwhile"
    ),
    "smoke": Section(
        "benchmarks.gpu.smoke", 40, limit_s=40, about="two layers and the head: right, repeatable, how fast a step is"
    ),
    "steps": Section("benchmarks.gpu.steps", 75, about="whole decode steps, prompts, sampling, gaps between steps"),
    "engine": Section(
        "benchmarks.gpu.engine", 40, about="200 mixed requests through scheduler and engine, each feature on and off"
    ),
    "guesses": Section(
        "benchmarks.gpu.guesses", 15, limit_s=30, about="several tokens of a sequence in a step: same bits, and times"
    ),
    "kernels": Section("benchmarks.gpu.speed", 45, about="each kernel by itself, next to cuBLAS and torch"),
    "eight-bit-cache": Section(
        "benchmarks.gpu.eight_bit_cache", 40, is_default=False, about="attention over 8-bit caches: right, and how fast"
    ),
    "quantized": Section(
        "benchmarks.gpu.quantized", 60, is_default=False, about="8-bit and 4-bit weights: right, and how fast"
    ),
    "checks": Section("benchmarks.gpu.checks", 60, about="each kernel in float16 against exact arithmetic"),
    "sweep": Section("benchmarks.gpu.sweep", 60, about="the launch settings that were chosen without a GPU"),
    "types": Section("benchmarks.gpu.checks_types", 60, is_default=False, about="the checks in bfloat16 and float32"),
    "peer": Section("benchmarks.gpu.peer", 60, is_default=False, about="Hugging Face's Persimmon on the same card"),
}

BUDGET_S = 360.0
"""Of a run, unless --budget gives another."""

START_S = 8.0
"""About what a process takes until it can compute: imports and the CUDA context."""

RESERVE_S = 4.0
"""Of the budget, for the end of the last process and the summary."""

ATTEMPT_LIMIT_S = 20.0
"""A part of a section that takes longer has hung."""


def section_end(section: Section, following: Sequence[Section], now: float, end: float) -> float:
    """When a section has used its share of the time that is left.

    Args:
        section: that starts now.
        following: the sections after it.
        now, end: of the run, on the same clock; what earlier sections left over is shared as well.
    """
    share = section.share / (section.share + sum(other.share for other in following))
    return now + min(section.limit_s, max(0.0, end - now) * share)
