"""The control groups that a process is in, of version 1 and 2, and what their files say.

Knows where the groups are mounted; nothing of what is limited.
"""

import re
from collections.abc import Iterator
from pathlib import Path

THIS_PROCESS = Path("/proc/self")


def control_groups(controller: str, proc: Path = THIS_PROCESS) -> Iterator[tuple[int, Path]]:
    """The groups that a process is in and those around them, each within the next, with the version of their files.

    Args:
        controller: version 1's name of what is limited: "memory" or "cpu".
        proc: the folder that describes the process.
    """
    for line in read_text(proc / "mountinfo").splitlines():
        # 35 31 0:32 /root /sys/fs/cgroup/memory rw,relatime shared:1 - cgroup cgroup rw,memory
        before, _, after = line.partition(" - ")
        mount, system = before.split(), after.split()
        if len(mount) < 5 or len(system) < 3:
            continue
        if system[0] == "cgroup2":
            version, name = 2, ""
        elif system[0] == "cgroup" and controller in system[2].split(","):
            version, name = 1, controller
        else:
            continue
        top = Path(_unescaped(mount[4]))
        folder = top / _below(_unescaped(mount[3]), _path_of_group(proc, name))
        for group in (folder, *folder.parents):
            yield version, group
            if group == top:
                break


def read_number(path: Path) -> int | None:
    """A file's number; None where there is no file, or the word max, which is no limit."""
    text = read_text(path).strip()
    return int(text) if text.isdecimal() else None


def read_text(path: Path) -> str:
    """A file's content; empty where there is no file, or this process may not read it."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _path_of_group(proc: Path, controller: str) -> str:
    """The path of a process's group in a hierarchy, '/' where the file has none."""
    for line in read_text(proc / "cgroup").splitlines():
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
