"""How much memory this process may still take: what is free on the machine, within the limits of its control groups.

Knows the files of control groups, version 1 and 2, and nothing of what the memory is for.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

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


def memory_left(proc: Path = Path("/proc/self")) -> MemoryLeft:
    """What is left where it is least: on the machine, or in one of the control groups that this process is in.

    A group is within others, and each of them has a limit of its own.  Unused file pages count as free: a
    checkpoint that was read leaves gigabytes of them, and they make room when asked to.

    Args:
        proc: the folder that describes this process.
    """
    machine = MemoryLeft(psutil.virtual_memory().available)
    groups = [left for files, folder in _groups(proc) if (left := files.left(folder)) is not None]
    return min((machine, *groups), key=lambda left: left.bytes)


@dataclass(frozen=True, slots=True)
class _Files:
    """Names of a control group's files in one of the two versions."""

    limits: tuple[str, ...]
    usage: str
    idle: str

    def left(self, folder: Path) -> MemoryLeft | None:
        """What a group still grants, None where it has no limit."""
        limits = [limit for name in self.limits if (limit := _number(folder / name)) is not None and limit < _NO_LIMIT]
        usage = _number(folder / self.usage)
        if not limits or usage is None:
            return None
        idle = re.search(rf"^{self.idle} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
        return MemoryLeft(max(0, min(limits) - usage + (int(idle[1]) if idle else 0)), min(limits), folder)


# Beyond memory.high a group is slowed down until it hardly runs, so that is a limit too.
_VERSION_2 = _Files(("memory.max", "memory.high"), "memory.current", "inactive_file")
_VERSION_1 = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def _groups(proc: Path) -> Iterator[tuple[_Files, Path]]:
    """The groups that this process is in and those around them, with the names of their files."""
    for line in _text(proc / "mountinfo").splitlines():
        # 35 31 0:32 /root /sys/fs/cgroup/memory rw,relatime shared:1 - cgroup cgroup rw,memory
        before, _, after = line.partition(" - ")
        mount, system = before.split(), after.split()
        if len(mount) < 5 or len(system) < 3:
            continue
        if system[0] == "cgroup2":
            files, controller = _VERSION_2, ""
        elif system[0] == "cgroup" and "memory" in system[2].split(","):
            files, controller = _VERSION_1, "memory"
        else:
            continue
        top = Path(_unescaped(mount[4]))
        folder = top / _below(_unescaped(mount[3]), _path_of_group(proc, controller))
        for group in (folder, *folder.parents):
            yield files, group
            if group == top:
                break


def _path_of_group(proc: Path, controller: str) -> str:
    """The path of this process's group in a hierarchy, '/' where the file has none."""
    for line in _text(proc / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            return path
    return "/"


def _below(root: str, path: str) -> str:
    """A group's path below the one that is mounted; empty where it is not below that, as in some containers."""
    inside = path.removeprefix(root.rstrip("/"))
    if ".." in path.split("/") or (inside == path and root != "/") or not inside.startswith("/"):
        return ""
    return inside.strip("/")


def _unescaped(field: str) -> str:
    """A field of mountinfo, in which blanks are octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _number(path: Path) -> int | None:
    """A file's number; None where there is no file, or the word max, which is no limit."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):  # not there, or not for this process to read
        return ""
