"""What a call launches on the GPU and how busy it is in between, as torch's profiler sees it.  Knows no kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.report import Report

NAME_LENGTH = 48


def profile_launches(report: Report, call: Callable[[], object], **about: Any) -> None:
    """Tables of a call's kernels: all together, and by name.

    Args:
        report: gets the tables.
        call: launches the same kernels every time.
        about: further columns.
    """
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(2):
            call()
        torch.cuda.synchronize()
    events: list[Any] = list(profiled.events() or [])
    kernels = [event for event in events if event.device_type.name == "CUDA"]
    kernels = [event for event in kernels if not event.name.startswith(("Memcpy", "Memset"))]
    # The second call: the first may have found the GPU asleep.
    kernels = sorted(kernels, key=lambda event: event.time_range.start)[len(kernels) // 2 :]
    if not kernels:
        report.note("the profiler saw no kernels")
        return
    span = max(event.time_range.end for event in kernels) - kernels[0].time_range.start
    by_name: dict[str, list[float]] = {}
    for event in kernels:
        by_name.setdefault(event.name[:NAME_LENGTH], []).append(float(event.time_range.elapsed_us()))
    busy = sum(map(sum, by_name.values()))
    report.row("launches", **about, kernels=len(kernels), span_us=float(span), busy_us=busy)
    for name, taken in sorted(by_name.items(), key=lambda item: -sum(item[1])):
        report.row("kernels of a step", **about, launches=len(taken), us=sum(taken), kernel=name)
