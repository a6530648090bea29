"""Runs the GPU suite with a tiny network on a simulated GPU: whole, or a section of it."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import worker
from benchmarks.gpu.report import Report, ResultFile
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.suite import SUITES, Setting
from tests.fake_cuda import fake_cuda
from tests.interpreter import keep_language_patched

NVIDIA_SMI = """#!/bin/sh
case "$*" in
*query-gpu=name,*) echo "NVIDIA H200, 9.0, 580.95, 143771 MiB" ;;
*) echo "1980 MHz, 1980 MHz, 3201 MHz, 120.0 W, 700.0 W, 40" ;;
esac
"""
"""Answers the two questions that the suite asks of the driver's tool."""


def work(job: worker.Job) -> None:
    """In place of `benchmarks.gpu.worker.work`, in the process that runs sections; kernels are left out."""
    with fake_cuda(repeats_replays=False, interprets_kernels=False):
        worker.work(replace(job, limit_s=600.0))


def run_section(name: str, folder: Path) -> dict[str, Any]:
    """Runs a section in this process, with its kernels; what it finds."""
    keep_language_patched()
    file = ResultFile(folder / "found.json")
    report = Report(file, name)
    with fake_cuda(repeats_replays=False):
        importlib.import_module(SECTIONS[name].module).run(Setting(SUITES["tiny"], torch.device("cuda"), 0), report)
        report.end()
    return file.section(name)
