"""Compiles the suite's kernels on all cores while the first section measures what the card can do.

Triton keeps what it has compiled in a cache on disk, which the processes that run sections then find.  A kernel that is
missing there is compiled when it is launched, so this saves time and decides nothing.  Makes no CUDA context.
"""

import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import replace
from threading import Event, Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from benchmarks.gpu.worker import Job, StartMethod

if TYPE_CHECKING:
    from benchmarks.gpu.compile_jobs import CompileJob

FIRST_SECTIONS = ("ceilings", "smoke")
"""Sections that wait for their kernels."""


class CompilePool:
    """Processes that compile while sections run; a context that ends them.

    Args:
        capability: the card's, as "9.0".
        shape: name of the suite's sizes.
        sections: whose kernels are compiled, the first ones first.
        start_method: of the processes.
    """

    def __init__(
        self, capability: str, shape: str, sections: Sequence[str], start_method: StartMethod = "spawn"
    ) -> None:
        self._capability = int(capability.replace(".", ""))
        self._shape = shape
        self._sections = list(sections)
        context: Any = multiprocessing.get_context(start_method)
        self._compiled = context.Event()
        self._ended = Event()
        # One core is left to the process that measures.
        cores = max(1, len(os.sched_getaffinity(0)) - 1)
        self._executor = ProcessPoolExecutor(cores, context, initializer=_start, initargs=(self._capability,))

    def attached(self, job: Job) -> Job:
        """The job, with the event that its first sections wait for."""
        return replace(job, compiled=self._compiled)

    def __enter__(self) -> Self:
        Thread(target=self._run, daemon=True, name="compile-pool").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        processes: dict[int, Any] = dict(self._executor._processes or {})
        self._executor.shutdown(wait=False, cancel_futures=True)
        for process in processes.values():
            process.kill()

    def _run(self) -> None:
        # Here, because it brings torch, which takes its time to import.
        from benchmarks.gpu.compile_jobs import jobs_of

        began = time.monotonic()
        waited: list[Future[int]] = []
        others: list[Future[int]] = []
        try:
            for name in self._sections:
                futures = waited if name in FIRST_SECTIONS else others
                futures += [self._executor.submit(_compile, self._shape, own) for own in jobs_of(self._shape, name)]
            count = _total(waited, self._ended)
        finally:
            self._compiled.set()
        print(f"     compiled for the first sections: {count} kernels, {time.monotonic() - began:.1f} s", flush=True)
        count = _total(others, self._ended)
        if self._ended.is_set():
            return
        print(f"     compiled for the others: {count} kernels, {time.monotonic() - began:.1f} s", flush=True)


def _total(futures: Sequence["Future[int]"], ended: Event) -> int:
    """Kernels that jobs have compiled; a job that fails compiles none, and its launch will show why.

    Args:
        futures: of the jobs.
        ended: set once what is left of them no longer matters.
    """
    count = 0
    for future in as_completed(futures):
        if future.cancelled() or ended.is_set():
            continue
        if (error := future.exception()) is not None:
            print(f"     could not be compiled ahead: {error!r}", flush=True)
            continue
        count += future.result()
    return count


_for_good = ExitStack()
_compiled: dict[Any, Any] = {}
"""What this process has compiled, in order."""


def _start(capability: int) -> None:
    """Makes every launch of this process a compilation."""
    from tests.kernels.ahead_of_time import launches_compile

    os.nice(10)
    global _compiled
    _compiled = _for_good.enter_context(launches_compile(capability))


def _compile(shape: str, job: "CompileJob") -> int:
    """Runs a job; how many kernels were new to this process."""
    before = len(_compiled)
    job.run(shape)
    for kernel in list(_compiled)[before:]:
        _compile_launcher(kernel)
    return len(_compiled) - before


def _compile_launcher(kernel: Any) -> None:
    """Triton 3.6 also compiles a small C program for each kernel's signature, when that is first launched."""
    with suppress(Exception):  # later versions have none, and no driver is loaded here
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(kernel.src, kernel.metadata)
