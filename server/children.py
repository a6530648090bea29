"""A child process of the server, and those that take its place when it dies.

Knows when it was ready and when it is due again; nothing of what it does.
"""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Collection, Iterator
from multiprocessing import connection
from multiprocessing.context import SpawnProcess

from server.restarts import WINDOW_SECONDS, Restarts


@contextlib.contextmanager
def blocking(signals: Collection[signal.Signals]) -> Iterator[None]:
    """Keeps signals waiting for the length of a block, and in processes that it starts from their first moment on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Child:
    """A process and its successors.

    Args:
        name: of the process, for tools that list processes.
        title: for people.
        main: what it runs.
        arguments: for that; behind them comes the end of a connection, on which it sends one message when it is ready.
        blocked: signals that it is started with blocked; they wait until it says otherwise.

    Attributes:
        title: for people.
        process: the last one.
        report: where that message comes; None when it has come, or cannot come any more.
        due: when the next one is to be started; None while one runs.
        has_served: whether one of them has been ready.
    """

    def __init__(
        self,
        name: str,
        title: str,
        main: Callable[..., None],
        *arguments: object,
        blocked: Collection[signal.Signals] = (),
    ) -> None:
        self._name = name
        self._main = main
        self._arguments = arguments
        self._blocked = blocked
        self._restarts = Restarts()
        self.title = title
        self.has_served = False
        self.start()

    def start(self) -> None:
        """Starts it, or the next one."""
        spawn = multiprocessing.get_context("spawn")
        report, end = spawn.Pipe(duplex=False)
        self.due: float | None = None
        self.report: connection.Connection | None = report
        self.process: SpawnProcess = spawn.Process(target=self._main, args=(*self._arguments, end), name=self._name)
        with blocking(self._blocked):
            self.process.start()
        end.close()  # so that a report's end is seen when its process ends

    def receive(self) -> object:
        """The message that it sends when it is ready; None where it has ended instead."""
        if self.report is None:
            return None
        try:
            message: object = self.report.recv()
            self.has_served = True
        except EOFError:  # the sentinel tells the rest
            message = None
        self._forget_report()
        return message

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal, unless it has ended: its process id may be another's by then."""
        if self.process.exitcode is None and self.process.pid is not None:
            os.kill(self.process.pid, number)

    def plan_restart(self, now: float) -> float | None:
        """Decides when the next one starts; called when it has died, after it has served.

        Args:
            now: in seconds, on the clock of `due`.

        Returns:
            Seconds from now; None where it has died too often.
        """
        self._forget_report()
        delay = self._restarts.delay_after_death(now)
        self.due = None if delay is None else now + delay
        return delay

    @property
    def obituary(self) -> str:
        """A line for people on how it ended, and how often."""
        self.process.join()
        line = f"{self.title} ended with code {self.process.exitcode}"
        if not self.has_served:
            return f"{line} before it was ready"
        if self._restarts.deaths > 1:
            line += f", death {self._restarts.deaths} in {WINDOW_SECONDS / 60:.0f} minutes"
        return line

    def _forget_report(self) -> None:
        if self.report is not None:
            self.report.close()
            self.report = None
