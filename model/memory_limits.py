"""How much memory this process may still take: what is free on the machine, within the limits of its control groups.

Knows nothing of what the memory is for.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import psutil

from persimmon.model.control_groups import THIS_PROCESS, control_groups, read_number, read_text
from persimmon.model.sizes import readable

_NO_LIMIT = 1 << 60
"""What version 1 reports for no limit is the largest multiple of a page below 2**63."""


@dataclass(frozen=True, slots=True)
class MemoryLeft:
    """Memory that can still be taken.

    Attributes:
        bytes: how much.
        limit: the limit of a control group that it is within; None where the machine's memory is what limits it.
        group: the folder of that control group.
    """

    bytes: int
    limit: int | None = None
    group: Path | None = None

    def __str__(self) -> str:
        """What limits it, for messages: 'left of the machine's memory', or of the group's limit."""
        if self.limit is None:
            return "left of this machine's memory"
        return f"left of the {readable(self.limit)} that the control group {self.group} allows"


def memory_left(proc: Path = THIS_PROCESS) -> MemoryLeft:
    """What is left where it is least: on the machine, or in one of the control groups that this process is in.

    A group is within others, and each of them has a limit of its own.  Unused file pages count as free: a
    checkpoint that was read leaves gigabytes of them, and they make room when asked to.

    Args:
        proc: the folder that describes this process.
    """
    machine = MemoryLeft(psutil.virtual_memory().available)
    groups = [
        left for version, folder in control_groups("memory", proc) if (left := _FILES[version].left(folder)) is not None
    ]
    return min((machine, *groups), key=lambda left: left.bytes)


@dataclass(frozen=True, slots=True)
class _Files:
    """Names of a control group's files in one of the two versions."""

    limits: tuple[str, ...]
    usage: str
    idle: str

    def left(self, folder: Path) -> MemoryLeft | None:
        """What a group still grants, None where it has no limit."""
        limits = [
            limit for name in self.limits if (limit := read_number(folder / name)) is not None and limit < _NO_LIMIT
        ]
        usage = read_number(folder / self.usage)
        if not limits or usage is None:
            return None
        idle = re.search(rf"^{self.idle} (\d+)$", read_text(folder / "memory.stat"), re.MULTILINE)
        return MemoryLeft(max(0, min(limits) - usage + (int(idle[1]) if idle else 0)), min(limits), folder)


_FILES = {
    1: _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    # Beyond memory.high a group is slowed down until it hardly runs, so that is a limit too.
    2: _Files(("memory.max", "memory.high"), "memory.current", "inactive_file"),
}
