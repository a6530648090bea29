"""What a command needs of its surroundings before it imports anything: quiet signals and three open descriptors.

Imports only what costs nothing.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType


def standard_streams() -> None:
    """Opens /dev/null in place of standard streams that are closed.

    Otherwise the next file or socket would get descriptor 2, and log lines would be written into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            os.set_inheritable(descriptor, True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115, lives as long as the process
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


@contextlib.contextmanager
def quiet_end() -> Iterator[None]:
    """For the length of a block, SIGINT and SIGTERM end the process without a traceback.

    Code inside may install handlers of its own.  A signal that is ignored stays so.
    """
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            before[number] = handler
            signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """For the length of a block, Ctrl-C raises KeyboardInterrupt, as Python's default is."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)  # so that a shell sees which signal it was
    os._exit(128 + number)  # the first process of a container survives its own signals
