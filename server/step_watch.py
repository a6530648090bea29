"""When a process counts as hung: an engine that has work and ends no step, a worker whose event loop does not turn.

Knows heartbeats, and nothing of what is done about one that stops.
"""

import time
from collections.abc import Callable

from persimmon.server.vitals import Vitals

GPU_STEP_SECONDS = 30.0
"""The longest step of an 8B model, 2,048 prompt tokens, takes 0.04 s on an H100; nothing is compiled while serving."""

CPU_STEP_SECONDS = 300.0
"""The same step takes three minutes on two cores that multiply 150 GFLOP/s."""

WORKER_START_SECONDS = 120.0
"""How long a worker may take to its first heartbeat, on a slow disk or a busy machine."""

LONGEST_GAP_SECONDS = 5.0
"""A watcher that has not looked for this long was stopped or starved itself, and perhaps the watched with it."""


def step_limit(given: float | None, device: str) -> float:
    """Seconds after which an engine that has work and ends no step counts as hung.

    Args:
        given: the setting; None for the default.
        device: the engine's, as it names it.
    """
    if given is not None:
        return given
    return GPU_STEP_SECONDS if device.startswith("cuda") else CPU_STEP_SECONDS


class _Attention:
    """How long something has been watched without a gap; the watcher must look every second or so.

    A server that was stopped as a whole, like a container that was paused, has old heartbeats when it goes on: the time
    before that does not count.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Starts to watch another process."""
        self._since = self._looked = self._clock()

    def seconds(self) -> float:
        """Looks; returns for how long it has looked without a gap."""
        now = self._clock()
        if now - self._looked > LONGEST_GAP_SECONDS:
            self._since = now
        self._looked = now
        return now - self._since


class StepWatch:
    """Watches an engine; it must be looked at every second or so.

    Args:
        vitals: where the heart beats.
        engine: its number.
        clock: seconds.
    """

    def __init__(self, vitals: Vitals, engine: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._vitals = vitals
        self._engine = engine
        self._attention = _Attention(clock)

    def restart(self) -> None:
        """Starts to watch another engine of this number."""
        self._attention.restart()

    def overdue_seconds(self) -> float:
        """Seconds of watching in which there was work and no step ended."""
        watched = self._attention.seconds()
        return min(self._vitals.overdue_seconds(self._engine), watched)


class WorkerWatch:
    """Watches one API worker; it must be looked at every second or so.

    Args:
        vitals: where the heart beats.
        worker: its number.
        limit: seconds that the event loop may take for one turn.
        clock: seconds.
    """

    def __init__(self, vitals: Vitals, worker: int, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._vitals = vitals
        self._worker = worker
        self._limit = limit
        self._attention = _Attention(clock)

    def restart(self) -> None:
        """Starts to watch another worker of this number."""
        self._attention.restart()

    def hung_seconds(self) -> float | None:
        """Seconds of watching in which the event loop has not turned, if that is more than allowed; else None."""
        watched = self._attention.seconds()
        silent = self._vitals.silent_seconds(self._worker)
        if silent is None:  # it is starting
            return watched if watched > max(WORKER_START_SECONDS, self._limit) else None
        silent = min(silent, watched)
        return silent if silent > self._limit else None
