"""Checks the kernels in bfloat16 and float32: the checks of float16, and whole steps."""

from functools import partial

import torch

from benchmarks.gpu.checks import check_types
from benchmarks.gpu.compare import type_name
from benchmarks.gpu.report import Report
from benchmarks.gpu.step_check import StepCheck
from benchmarks.gpu.suite import Setting


def run(setting: Setting, report: Report) -> None:
    """Each type after the other."""
    for dtype in setting.suite.other_dtypes:
        report.attempt(f"decode step, {type_name(dtype)}", partial(_step, setting, report, dtype), seconds=6)
        check_types(setting, report, (dtype,))


def _step(setting: Setting, report: Report, dtype: torch.dtype) -> None:
    check = StepCheck(setting, report, dtype)
    check.near_float32()
    check.captured()
    check.alone()
    check.skips()
