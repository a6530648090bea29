"""The number of processor cores that this process may keep busy. Knows nothing about threads."""

import math
import os
from pathlib import Path

from persimmon.model.control_groups import THIS_PROCESS, control_groups, read_number, read_text


def usable_cores(proc: Path = THIS_PROCESS) -> int:
    """The cores that the scheduler lets this process run on, or fewer where a control group has a smaller share.

    More threads than that would use up the share early in each period and all stall for the rest of it.

    Args:
        proc: the folder that describes this process.
    """
    cores = len(os.sched_getaffinity(0))
    shares = (_share(version, folder) for version, folder in control_groups("cpu", proc))
    return max(1, min([cores, *(math.ceil(share) for share in shares if share is not None)]))


def _share(version: int, folder: Path) -> float | None:
    """Cores that a group may keep busy; None where it has no limit."""
    if version == 2:
        quota, _, period = read_text(folder / "cpu.max").strip().partition(" ")  # "max 100000" for no limit
        return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None
    # A quota of -1 is no limit, and no number for read_number.
    limit, length = read_number(folder / "cpu.cfs_quota_us"), read_number(folder / "cpu.cfs_period_us")
    return limit / length if limit and length else None
