"""The process that runs sections: one CUDA context for as many of them as its device survives.

Continues where an earlier process of the same run has ended.  Knows no kernel.
"""

import gc
import importlib
import math
import multiprocessing.synchronize
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from benchmarks.gpu.report import PreparationError, Report, ResultFile, Terms
from benchmarks.gpu.sections import ATTEMPT_LIMIT_S, Section, section_end

if TYPE_CHECKING:
    from benchmarks.gpu.suite import Setting

StartMethod = Literal["spawn", "fork"]


@dataclass(frozen=True, slots=True)
class Job:
    """What a process runs.

    Attributes:
        sections: by name, in order; those that have ended already, as the file says, are not run again.
        shape: name of the suite's sizes.
        device: "cuda" or "cpu".
        seed: of all random inputs.
        out: the file of results.
        ends_at: when the run's time is over, on `time.monotonic`; infinite on a CPU.
        limit_s: of an attempt; None on a CPU.
        stacks: file that gets the stacks when an attempt takes too long.
        only: section and attempt, where nothing else is to run.
        start_method: how processes come to be; a forked one has no CUDA.
        compiled: set once the kernels of the first sections are compiled; None where nothing is.
    """

    sections: dict[str, Section]
    shape: str
    device: str
    seed: int
    out: Path
    ends_at: float = math.inf
    limit_s: float | None = ATTEMPT_LIMIT_S
    stacks: Path | None = None
    only: tuple[str, str] | None = None
    start_method: StartMethod = "spawn"
    compiled: "multiprocessing.synchronize.Event | None" = field(default=None)


def work(job: Job) -> None:
    """Runs a job in this process."""
    import torch

    from benchmarks.gpu.suite import SUITES, Setting

    if job.device == "cpu":
        # The interpreter's own products depend on their shapes and take no bfloat16; those of the tests are a GPU's.
        import pytest

        from tests.interpreter import multiply_as_matrix_units

        multiply_as_matrix_units(pytest.MonkeyPatch())
    # As in the server: split products are added up in float32.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    setting = Setting(suite=SUITES[job.shape], device=torch.device(job.device), seed=job.seed, compiled=job.compiled)
    with (job.stacks or Path("/dev/stderr")).open("ab") as stacks:
        for name, section in job.sections.items():
            _run_section(job, name, section, setting, stacks.fileno())


def _run_section(job: Job, name: str, section: Section, setting: "Setting", stacks: int) -> None:
    import torch

    file = ResultFile(job.out)
    if has_ended(file, name) or (job.only is not None and job.only[0] != name):
        return
    on_gpu = job.device == "cuda"
    names = list(job.sections)
    following = [job.sections[other] for other in names[names.index(name) + 1 :]]
    terms = Terms(
        ends_at=section_end(section, following, time.monotonic(), job.ends_at),
        limit_s=job.limit_s,
        killed_at=job.ends_at,
        stacks=stacks,
        only=None if job.only is None else job.only[1],
        **({"synchronize": torch.cuda.synchronize} if on_gpu else {}),
    )
    report = Report(file, name, terms)
    try:
        importlib.import_module(section.module).run(setting, report)
    except PreparationError:
        pass
    except Exception as error:  # noqa: BLE001 - between attempts; it belongs in the report
        report.error(name, error)
    report.end()
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()


def has_ended(file: ResultFile, name: str) -> bool:
    """Whether a section has run to its end, in this run or an earlier one."""
    return "seconds" in file.content.get("sections", {}).get(name, {})
