"""Runs a section of the GPU suite on a tiny network in Triton's interpreter, and records which kernels it launches."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from triton.runtime.interpreter import InterpretedFunction

from benchmarks.gpu.cli import failures
from benchmarks.gpu.compile_jobs import jobs_of
from benchmarks.gpu.report import Report, ResultFile
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.suite import SUITES, Setting

COMPILED_AHEAD = ("smoke", "steps", "engine")
"""Sections all of whose kernels are compiled before they run."""

SLOW = ("smoke", "steps", "engine", "guesses", "checks", "eight-bit-cache")
"""Sections that take ten to twenty seconds each; tests/exhaustive runs them."""


@contextmanager
def launches_recorded(*, runs: bool = True) -> Iterator[set[tuple]]:
    """What Triton would compile: kernels with their constants, and the types of their pointers."""
    launched: set[tuple] = set()
    run = InterpretedFunction.run

    def record(self, *args, grid, warmup, **options):
        types = tuple(str(arg.dtype) if isinstance(arg, torch.Tensor) else arg is None for arg in args)
        launched.add((self.__name__, types, tuple(sorted(options.items()))))
        return run(self, *args, grid=grid, warmup=warmup or not runs, **options)

    InterpretedFunction.run = record
    try:
        yield launched
    finally:
        InterpretedFunction.run = run


def run_compiled_ahead(name: str, folder: Path) -> None:
    """Runs a section, which must find no fault and launch nothing that its compile jobs leave out."""
    file = ResultFile(folder / "found.json")
    report = Report(file, name)
    with launches_recorded() as launched:
        importlib.import_module(SECTIONS[name].module).run(Setting(SUITES["tiny"], torch.device("cpu"), 0), report)
    report.end()
    section = file.section(name)
    assert failures({name: section}) == []
    assert section["checks"] or section["rows"] or name == "types"
    with launches_recorded(runs=False) as compiled:
        for earlier in list(SECTIONS)[: list(SECTIONS).index(name) + 1]:
            for job in jobs_of("tiny", earlier):
                job.run("tiny")
    if name in COMPILED_AHEAD:
        assert not launched - compiled
