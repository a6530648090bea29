"""A section of the GPU suite whose attempts go wrong in every way that a kernel can; see test_gpu_supervisor."""

import os
import signal
import threading

from benchmarks.gpu.report import Report
from benchmarks.gpu.suite import Setting

ONLY_HANGS = 1
"""A seed with which nothing else happens."""


def run(setting: Setting, report: Report) -> None:
    def number(name: str) -> None:
        report.row("numbers", what=name, blocking=os.environ.get("CUDA_LAUNCH_BLOCKING", "0"))

    def raises() -> None:
        raise ValueError("a plain error")

    def crashes() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def hangs() -> None:
        if os.environ.get("CUDA_LAUNCH_BLOCKING") != "1":
            threading.Event().wait()

    if setting.seed == ONLY_HANGS:
        report.attempt("hangs", hangs, seconds=0)
        return
    report.prepare("inputs", lambda: True)
    report.attempt("first", lambda: number("first"))
    report.attempt("raises", raises)
    report.attempt("crashes", crashes)
    report.attempt("between", lambda: number("between"))
    report.attempt("hangs", hangs)
    report.attempt("last", lambda: number("last"))
