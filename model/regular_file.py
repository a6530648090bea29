"""Opens files of a checkpoint: only regular ones, and small ones whole up to a limit.

Opening a FIFO waits for a writer and reading a device may never end, so neither is opened.
"""

import os
import stat
from io import BufferedReader
from pathlib import Path

from persimmon.model.errors import CheckpointError

MAX_SMALL_FILE = 16 << 20
"""Bytes of a JSON file that is read whole.  Parsing takes a multiple of its size in memory."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: Path) -> int:
    """The size of a regular file, in bytes.

    Raises:
        CheckpointError: there is no such file, or it is a folder, a FIFO, a device, or a link that leads nowhere.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link to {os.readlink(path)}, which does not exist") from None
        raise CheckpointError(f"{path} cannot be read: No such file or directory") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "not a file")
        raise CheckpointError(f"{path} is {kind}; expected a regular file")
    return status.st_size


def open_regular(path: Path) -> BufferedReader:
    """A regular file, opened for reading.

    Raises:
        CheckpointError: as `check_regular`, or the file cannot be opened.
    """
    check_regular(path)
    try:
        # It may have become a FIFO since it was checked.
        return open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def read_small(path: Path, limit: int = MAX_SMALL_FILE) -> bytes | None:
    """The content of a file; None where there is no such file.

    Args:
        path: the file.
        limit: its largest size, in bytes.

    Raises:
        CheckpointError: it is not a regular file, cannot be read, or is larger than the limit.
    """
    if not os.path.lexists(path):
        return None
    with open_regular(path) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > limit:
        raise CheckpointError(
            f"{path} has {path.stat().st_size:,} bytes; expected at most {limit:,} for a file of that name"
        )
    return content
