"""What every child process of the server does first."""

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import connection, parent_process

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def follow_supervisor(orphaned: Callable[[], None] | None = None) -> None:
    """Leaves Ctrl-C to the supervisor, and ends this process when the supervisor goes, however it goes.

    Args:
        orphaned: called before that.  Without it, the kernel kills the process, which nothing can hold up; with it, the
            kernel lets it run on if it was stopped.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    # Of the thread that started this process: the supervisor's main one.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if orphaned is None else signal.SIGCONT)

    def wait() -> None:
        connection.wait([parent.sentinel])
        if orphaned is not None:
            with contextlib.suppress(Exception):
                orphaned()
        os._exit(1)

    # For what has ended before the kernel was asked, too.
    threading.Thread(target=wait, name="follow-supervisor", daemon=True).start()
