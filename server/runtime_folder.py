"""The private folder in which the processes of a server have their sockets and shared files.

Knows which folders are this program's, and which of them are left over; nothing of what is in them.
"""

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "persimmon-run-"
_FOLDER = re.compile(rf"{_PREFIX}[a-z0-9_]{{8}}")

_MAX_SOCKET_BYTES = 107
"""Of a unix socket's path on Linux (sun_path without its final NUL)."""

_LONGEST_NAME = "api-255"


class RuntimeFolderError(OSError):
    """The folder cannot be created. One line for the person who can change that."""


@contextlib.contextmanager
def runtime_folder() -> Iterator[Path]:
    """A folder of this process, for the length of a block; first removes those that killed servers have left.

    Raises:
        RuntimeFolderError: temporary files cannot be written, or a socket's path would be too long.
    """
    try:
        parent = Path(tempfile.gettempdir())
    except OSError as error:
        raise RuntimeFolderError(f"{error.strerror or error}; set TMPDIR to a writable folder") from None
    _check_length(parent)
    remove_stale(parent)
    folder, lock = _locked_folder(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_stale(parent: Path) -> None:
    """Removes this user's runtime folders of servers that were killed: those that no process has locked."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if _FOLDER.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    _remove_if_stale(Path(entry.path))


def _check_length(parent: Path) -> None:
    longest = len(os.fsencode(parent / f"{_PREFIX}12345678" / _LONGEST_NAME))
    if longest > _MAX_SOCKET_BYTES:
        most = len(os.fsencode(parent)) - (longest - _MAX_SOCKET_BYTES)
        raise RuntimeFolderError(
            f"the path {parent} is too long for unix sockets (at most {most} bytes); set TMPDIR to a shorter one, for "
            f"example /tmp"
        )


def _locked_folder(parent: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that locks it.  The lock also keeps systemd-tmpfiles from removing old files."""
    while True:
        try:
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))  # mode 0700: private to this user
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise RuntimeFolderError(
                f"cannot create a folder for sockets in {parent}: {error.strerror}; set TMPDIR to a writable folder"
            ) from None
        # Another server, starting now, may have taken it for a stale one before it was locked.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.samestat(os.stat(folder), os.fstat(lock)):
                return folder, lock
        os.close(lock)


def _remove_if_stale(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(descriptor)
        if status.st_uid == os.getuid() and stat.S_IMODE(status.st_mode) == 0o700:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its server runs
            with os.scandir(descriptor) as entries:
                ours = not any(entry.is_dir(follow_symlinks=False) for entry in entries)  # servers make files only
            if ours:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
