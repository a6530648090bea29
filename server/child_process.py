"""What every child process of the server does first, before it imports what its work needs."""

import contextlib
import ctypes
import faulthandler
import fcntl
import os
import pickle
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from multiprocessing import connection, current_process, parent_process

from persimmon.server import logs
from persimmon.server.shortage import ADVICE, shortage

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

STACKS_PIPE_BYTES = 1 << 20
"""A hundred threads, which is as many as are written, have some 100 KB of stacks."""

_open: list[connection.Connection] = []
"""What is used to the end of the process."""

_at_orphaned: list[Callable[[], None]] = []


@dataclass(frozen=True, slots=True)
class CannotStart:
    """What a process reports, in place of being ready, when it ends because of something that a person can fix.

    Attributes:
        reason: one line, which is on the console too.
    """

    reason: str


def run(pickled: bytes, stacks: connection.Connection | None) -> None:
    """Entry point of a process that `persimmon.server.children.spawn` starts.

    Args:
        pickled: a function and its arguments.  They are unpickled late, because that imports modules for a second or
            more, in which the death of the supervisor must already end this process.
        stacks: where the stacks of all threads go at SIGUSR1; None for standard error.
    """
    write_stacks_at_signal(stacks)
    with logs.in_background(), logs.error_logged(), _shortage_explained():
        follow_supervisor()
        main, arguments = pickle.loads(pickled)  # noqa: S301, from the process that started this one
        main(*arguments)


def write_stacks_at_signal(to: connection.Connection | None = None) -> None:
    """Writes the stacks of all threads at SIGUSR1, also while no Python code runs because one of them is held up in C.

    Args:
        to: a pipe whose reader may be slow, for what does not fit is lost; None for standard error.
    """
    if to is None:
        faulthandler.register(signal.SIGUSR1)
    else:
        os.set_blocking(to.fileno(), False)
        with contextlib.suppress(OSError):  # a user's pipes may have used up what the system allows
            fcntl.fcntl(to, fcntl.F_SETPIPE_SZ, STACKS_PIPE_BYTES)
        _open.append(to)
        faulthandler.register(signal.SIGUSR1, to.fileno())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


@contextlib.contextmanager
def _shortage_explained() -> Iterator[None]:
    """Makes an error for want of memory, threads or files one line and exit code 2: it is nothing to debug."""
    try:
        yield
    except Exception as error:
        reason = shortage(error)
        if reason is None:
            raise
        logs.print_line(f"persimmon: error: {current_process().name} cannot go on: {reason}; {ADVICE}")
        logs.flush()
        os._exit(2)  # an orderly exit may fail for the same reason


def prctl(option: int, value: int) -> None:
    """Changes an attribute of this process, as the system call of this name does."""
    ctypes.CDLL(None).prctl(option, value)


def ignore(numbers: Collection[signal.Signals]) -> None:
    """Ignores signals that this process was started with blocked."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def follow_supervisor(orphaned: Callable[[], None] | None = None) -> None:
    """Leaves Ctrl-C to the supervisor, and ends this process when the supervisor ends for any reason.

    May be called again, to add `orphaned`.

    Args:
        orphaned: called before this process ends.  Without it the kernel kills the process, which nothing can delay;
            with it, the kernel continues the process if it was stopped.
    """
    ignore({signal.SIGINT})
    parent = parent_process()
    if parent is None:
        return
    # Of the thread that started this process: the supervisor's main one.
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if orphaned is None else signal.SIGCONT)
    if orphaned is not None:
        _at_orphaned.append(orphaned)
    if any(thread.name == _FOLLOWER for thread in threading.enumerate()):
        return

    def wait() -> None:
        connection.wait([parent.sentinel])
        for each in _at_orphaned:
            with contextlib.suppress(Exception):
                each()
        os._exit(1)

    # Also notices a supervisor that had ended before the kernel was asked.
    threading.Thread(target=wait, name=_FOLLOWER, daemon=True).start()


_FOLLOWER = "follow-supervisor"
