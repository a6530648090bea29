"""What the kernels have to reach on an H100 or H200, and how that is judged.

Shares of what the card at hand copied and multiplied, so one table holds for both cards.  Figures get their names here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COPY, READ, L2_READ = "copy bytes/s", "read bytes/s", "L2 read bytes/s"
MATMUL, MATMUL_BFLOAT16 = "float16 matmul flop/s", "bfloat16 matmul flop/s"
COPY_OF_NOMINAL = "copy rate, share of the card's nominal bandwidth"
DENSE_1, SPARSE_1 = "batch 1 dense, share of its roofline", "batch 1 at 90% zeros, share of its roofline"
DECODE_ATTENTION = "decode attention at 64 x 512, share of the copy rate"
STEP_64 = "whole step at 64 x 512, share of its roofline"
PROMPT_2K = "prompt of 2,048, share of the matmul rate"
SAMPLING = "sampling, share of a step at 64 x 512"
IDLE = "GPU idle between steps at batch 64, share of the time"
PREDICTED = "predicted from two layers: "
"""Prefix of the smoke's figures, which stand in while the figure itself has not been measured."""

NOMINAL_BYTES = {"H100": 3.35e12, "H200": 4.8e12}
"""Memory bandwidth of the SXM cards as their data sheets state it, bytes/s."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure has to reach."""

    figure: str
    bound: float
    at_least: bool = True

    def met(self, measured: float | None) -> bool | None:
        """None where nothing was measured."""
        if measured is None:
            return None
        return measured >= self.bound if self.at_least else measured <= self.bound

    def __str__(self) -> str:
        return f"at {'least' if self.at_least else 'most'} {self.bound:.0%}"


TARGETS = (
    Target(COPY_OF_NOMINAL, 0.85),
    Target(DENSE_1, 0.88),
    Target(SPARSE_1, 0.80),
    Target(DECODE_ATTENTION, 0.88),
    Target(STEP_64, 0.80),
    Target(PROMPT_2K, 0.60),
    Target(SAMPLING, 0.03, at_least=False),
    Target(IDLE, 0.03, at_least=False),
)


def nominal_bytes(device: str) -> float | None:
    """The data sheet's bandwidth of a card by the name that its driver reports; None for another card."""
    return next((rate for card, rate in NOMINAL_BYTES.items() if card in device), None)


def judged(figures: Mapping[str, float], about: Mapping[str, str]) -> list[dict[str, Any]]:
    """The targets with what was measured.

    Args:
        figures: by name.
        about: what each was computed from.
    """
    return [_judged(target, figures, about) for target in TARGETS]


def _judged(target: Target, figures: Mapping[str, float], about: Mapping[str, str]) -> dict[str, Any]:
    measured = figures.get(target.figure)
    predicted = PREDICTED + target.figure
    outcome = {None: "not measured", True: "met", False: "missed"}[target.met(measured)]
    if measured is None and predicted in figures:
        outcome = f"not measured; predicted {figures[predicted]:.0%}"
    return {
        "figure": target.figure,
        "measured": measured,
        "target": str(target),
        "outcome": outcome,
        "about": about.get(target.figure) or about.get(predicted, ""),
    }


def table(judgements: list[dict[str, Any]], device: str) -> str:
    """The targets for a terminal."""
    lines = [f"== targets on {device}", f"{'':<56} {'measured':>9} {'target':>13}  "]
    for own in judgements:
        measured = "-" if own["measured"] is None else f"{own['measured']:.1%}"
        about = f" ({own['about']})" if own["about"] else ""
        lines.append(f"{own['figure']:<56} {measured:>9} {own['target']:>13}  {own['outcome']}{about}")
    return "\n".join(lines)
