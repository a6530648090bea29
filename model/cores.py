"""How many processor cores this process may keep busy.  Knows no threads."""

import math
import os
from pathlib import Path


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The cores that the scheduler lets this process run on, or fewer where its container has a smaller share of them.

    More threads than that would use the share up in the first part of each period and all stand still for the rest.

    Args:
        cgroup: where the control group's files are (version 2, then version 1).
    """
    cores = len(os.sched_getaffinity(0))
    for read in (_quota, _quota_v1):
        try:
            share = read(cgroup)
        except (OSError, ValueError):  # no such file, or the word "max": no limit
            continue
        if share > 0:
            return max(1, min(cores, math.ceil(share)))
    return cores


def _quota(cgroup: Path) -> float:
    quota, period = (cgroup / "cpu.max").read_text().split()
    return int(quota) / int(period)


def _quota_v1(cgroup: Path) -> float:
    quota = int((cgroup / "cpu/cpu.cfs_quota_us").read_text())  # -1 for no limit
    return quota / int((cgroup / "cpu/cpu.cfs_period_us").read_text())
