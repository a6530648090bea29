"""When an engine counts as hung: it has work, and has ended no step for too long.

Knows the heartbeat, and nothing of what is done about one that stops.
"""

import time
from collections.abc import Callable

from server.vitals import Vitals

GPU_STEP_SECONDS = 30.0
"""The longest step of an 8B model, 2,048 prompt tokens, takes 0.04 s on an H100; nothing is compiled while serving."""

CPU_STEP_SECONDS = 300.0
"""The same step takes three minutes on two cores that multiply 150 GFLOP/s."""

LONGEST_GAP_SECONDS = 5.0
"""Who has not looked for so long has been stopped or starved, and the engine perhaps with him."""


def step_limit(given: float | None, device: str) -> float:
    """Seconds after which an engine that has work and ends no step counts as hung.

    Args:
        given: the setting; None for the default.
        device: the engine's, as it names it.
    """
    if given is not None:
        return given
    return GPU_STEP_SECONDS if device.startswith("cuda") else CPU_STEP_SECONDS


class StepWatch:
    """Watches one engine; it must be looked at every second or so.

    A server that was stopped as a whole, like a container that was paused, has an old heartbeat when it goes on: the
    time before that does not count.

    Args:
        vitals: where the heart beats.
        clock: seconds.
    """

    def __init__(self, vitals: Vitals, clock: Callable[[], float] = time.monotonic) -> None:
        self._vitals = vitals
        self._clock = clock
        self._since = self._looked = clock()

    def restart(self) -> None:
        """There is another engine from now on."""
        self._since = self._looked = self._clock()

    def overdue_seconds(self) -> float:
        """For how long, under its eyes, there has been work and no step has ended."""
        now = self._clock()
        if now - self._looked > LONGEST_GAP_SECONDS:
            self._since = now
        self._looked = now
        return min(self._vitals.overdue_seconds, now - self._since)
