"""The processor cores that this process may keep busy, and parts of them. Knows nothing about threads."""

import math
import os
from itertools import pairwise
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


def core_shares(count: int, cpus: Path = Path("/sys/devices/system/cpu")) -> list[frozenset[int]]:
    """The cores that the scheduler lets this process run on, in `count` parts of nearly equal size.

    The threads of a core, and the cores of a socket, are in one part as far as possible.

    Args:
        count: how many parts; at most as many as there are cores.
        cpus: the folder that describes the machine's cores.
    """

    def place(core: int) -> tuple[int, int, int]:
        topology = cpus / f"cpu{core}" / "topology"
        socket = read_number(topology / "physical_package_id") or 0
        own = read_number(topology / "core_id")
        return socket, core if own is None else own, core

    cores = sorted(os.sched_getaffinity(0), key=place)
    ends = [len(cores) * part // count for part in range(count + 1)]
    return [frozenset(cores[begin:end]) for begin, end in pairwise(ends)]


def _share(version: int, folder: Path) -> float | None:
    """Cores that a group may keep busy; None where it has no limit."""
    if version == 2:
        quota, _, period = read_text(folder / "cpu.max").strip().partition(" ")  # "max 100000" for no limit
        return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None
    # A quota of -1 is no limit, and no number for read_number.
    limit, length = read_number(folder / "cpu.cfs_quota_us"), read_number(folder / "cpu.cfs_period_us")
    return limit / length if limit and length else None
