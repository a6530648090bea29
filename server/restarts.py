"""When a process that has died is started again: at once, then after growing delays, in the end not at all.

Decides only; starts nothing.
"""

from collections import deque
from dataclasses import dataclass, field

MAX_DEATHS = 5
"""Deaths in a window after which the process is not started again: the cause is unlikely to go away."""

WINDOW_SECONDS = 600.0

FIRST_DELAY_SECONDS = 0.5
"""Delay of the second restart in a window; it doubles with each further one.  The first has none."""

MAX_DELAY_SECONDS = 4.0
"""Longest delay between attempts to start a process that the system refuses.  They cost little, so they go on."""


@dataclass(slots=True)
class Restarts:
    """The deaths of one process and its successors."""

    _deaths: deque[float] = field(default_factory=deque)
    _failed_starts: int = 0

    @property
    def deaths(self) -> int:
        """Number of deaths in the window that ends with the last one."""
        return len(self._deaths)

    def delay_after_death(self, now: float) -> float | None:
        """Seconds to wait before the next start; None for no further start.

        Args:
            now: when it died, in seconds.
        """
        self._failed_starts = 0
        self._deaths.append(now)
        while self._deaths[0] < now - WINDOW_SECONDS:
            self._deaths.popleft()
        if self.deaths >= MAX_DEATHS:
            return None
        return 0.0 if self.deaths == 1 else FIRST_DELAY_SECONDS * 2.0 ** (self.deaths - 2)

    def delay_after_failed_start(self) -> float:
        """Seconds to wait before the next attempt to start a process that could not even be created."""
        self._failed_starts += 1
        return min(FIRST_DELAY_SECONDS * 2.0 ** (self._failed_starts - 1), MAX_DELAY_SECONDS)
