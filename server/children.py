"""A child process of the server and its successors.

Knows when it was ready and when the next one is due; nothing about what it does.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from multiprocessing import connection, reduction, resource_tracker
from multiprocessing.context import SpawnProcess
from types import ModuleType

from persimmon.server import child_process
from persimmon.server.restarts import WINDOW_SECONDS, Restarts

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

HELD_BACK = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})
"""Signals that wait, in a new process, until it has decided what to do with them."""


STACKS_PAUSE_SECONDS = 0.1
"""Stacks of which nothing more has come in this time are complete."""


class _Later:
    """Makes its value bytes when it is pickled, so that the reader decides when to unpickle it."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __reduce__(self) -> tuple[type[bytes], tuple[bytes]]:
        return bytes, (bytes(reduction.ForkingPickler.dumps(self._value)),)


@contextlib.contextmanager
def blocking(signals: Collection[signal.Signals]) -> Iterator[None]:
    """Keeps signals waiting for the length of a block, and in processes that it starts from their first moment on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def spawn(
    name: str, main: Callable[..., None], *arguments: object, stacks: connection.Connection | None = None
) -> SpawnProcess:
    """Starts a process of a fresh interpreter.

    It ends when this process does, and has HELD_BACK blocked.

    Args:
        name: of the process, for tools that list processes.
        main: what it runs.
        arguments: for `main`.
        stacks: where it writes the stacks of its threads at SIGUSR1; None for standard error.

    Raises:
        OSError: the system allows no more processes or has no memory for one.
    """
    process = multiprocessing.get_context("spawn").Process(
        target=child_process.run, args=(_Later((main, arguments)), stacks), name=name
    )
    with blocking({signal.SIGHUP, signal.SIGUSR1}):
        resource_tracker.ensure_running()  # here, because it unblocks some signals
    with blocking(HELD_BACK), _without_main():
        process.start()
    return process


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """For the length of a block, new processes do not import this one's main file.

    multiprocessing has it imported again for functions that are defined there.  Ours are not, and the file may be any
    program, which would run once more or bring what the process does not need.
    """
    with _main_lock:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


_main_lock = threading.Lock()


class Child:
    """A process and its successors.  It is due at once.

    Args:
        name: of the process, for tools that list processes.
        title: for people.
        main: what it runs.
        arguments: of `main`; after them, it gets the end of a connection on which it sends one message when ready.

    Attributes:
        title: for people.
        process: the last one; None before the first.
        started: when it started, in seconds on the clock of `due`.
        report: where that message comes; None when it has come, or cannot come any more.
        stacks: where the stacks of its threads come; None before the first process.
        due: when the next one is to be started, on the monotonic clock; None while one runs.
        has_served: whether one of them has been ready.
    """

    def __init__(self, *, name: str, title: str, main: Callable[..., None], arguments: tuple[object, ...]) -> None:
        self._name = name
        self._main = main
        self._arguments = arguments
        self._restarts = Restarts()
        self.title = title
        self.process: SpawnProcess | None = None
        self.started = 0.0
        self.report: connection.Connection | None = None
        self.stacks: connection.Connection | None = None
        self.due: float | None = time.monotonic()
        self.has_served = False

    def start(self) -> None:
        """Starts it, or the next one.

        Raises:
            OSError: the system allows no more processes or files, or has no memory for one.
        """
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            report, end = _pipe(ours, theirs)
            stacks, stacks_end = _pipe(ours, theirs)
            self.process = spawn(self._name, self._main, *self._arguments, end, stacks=stacks_end)
            ours.pop_all()
        self._forget_stacks()
        self.started = time.monotonic()
        self.due = None
        self.report, self.stacks = report, stacks

    @property
    def sentinel(self) -> int | None:
        """A descriptor that is readable when the running process has ended; None where none runs."""
        return None if self.process is None or self.due is not None else self.process.sentinel

    def receive(self) -> object:
        """The message that it sends when it is ready or cannot start; None where it has ended instead."""
        if self.report is None:
            return None
        try:
            message: object = self.report.recv()
            self.has_served = not isinstance(message, child_process.CannotStart)
        except EOFError:  # the sentinel shows the rest
            message = None
        self._forget_report()
        return message

    def read_stacks(self) -> str:
        """What it has written since the last call; empty where that is nothing, and at its end."""
        parts: list[bytes] = []
        # It writes them in small pieces, but without a pause.
        while self.stacks is not None and self.stacks.poll(STACKS_PAUSE_SECONDS if parts else 0):
            part = os.read(self.stacks.fileno(), 1 << 16)
            if not part:
                self._forget_stacks()
            parts.append(part)
        return b"".join(parts).decode(errors="replace")

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal, unless it has ended: its process id may be another's by then."""
        if self.process is not None and self.process.exitcode is None and self.process.pid is not None:
            os.kill(self.process.pid, number)

    def join(self) -> int | None:
        """Waits for its end; the exit code, which is negative after a signal."""
        if self.process is None:
            return None
        self.process.join()
        return self.process.exitcode

    def plan_restart(self) -> float | None:
        """Decides when the next one starts; called when it has died, after it has served.

        Returns:
            Seconds from now; None where it has died too often.
        """
        self._forget_report()
        now = time.monotonic()
        delay = self._restarts.delay_after_death(now)
        self.due = None if delay is None else now + delay
        return delay

    def postpone(self) -> float:
        """Decides when to try again to start it; called when that has failed.

        Returns:
            Seconds from now.
        """
        delay = self._restarts.delay_after_failed_start()
        self.due = time.monotonic() + delay
        return delay

    @property
    def exit_summary(self) -> str:
        """A line for people on how it ended, and how often."""
        line = f"{self.title} ended with code {self.join()}"
        if not self.has_served:
            return f"{line} before it was ready"
        if self._restarts.deaths > 1:
            line += f", death {self._restarts.deaths} in {WINDOW_SECONDS / 60:.0f} minutes"
        return line

    def _forget_report(self) -> None:
        if self.report is not None:
            self.report.close()
            self.report = None

    def _forget_stacks(self) -> None:
        if self.stacks is not None:
            self.stacks.close()
            self.stacks = None


def _pipe(
    ours: contextlib.ExitStack, theirs: contextlib.ExitStack
) -> tuple[connection.Connection, connection.Connection]:
    """A pipe from a new process; its end is closed here, so that the end of the process is the end of the pipe."""
    read, write = multiprocessing.get_context("spawn").Pipe(duplex=False)
    return ours.enter_context(read), theirs.enter_context(write)


def adopt_orphans() -> None:
    """Makes this process the parent of what its children have started when they end before it, as an init would be.

    `reap_orphans` then has to be called now and then.
    """
    child_process.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def reap_orphans(children: Collection[Child]) -> None:
    """Collects the exit codes of adopted processes that have ended, which otherwise remain as zombies.

    Args:
        children: those of this process, whose exit codes are for multiprocessing to collect.
    """
    own = {child.process.pid for child in children if child.process is not None and child.due is None}
    with contextlib.suppress(ChildProcessError):  # there are no children at all
        # An ended child of our own hides others until it has been joined; they come the next time.
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in own:
            os.waitpid(ended.si_pid, 0)


def kill(children: Collection[Child]) -> None:
    """Ends processes at once, and waits for it."""
    for child in children:
        child.send(signal.SIGKILL)
    for child in children:
        child.join()
