"""When a process that has died is started again: at once, then later and later, and at last never.

Decides and does nothing else.
"""

from collections import deque
from dataclasses import dataclass, field

MOST_DEATHS = 5
"""So many deaths in a window are no accident: who started the server must know."""

WINDOW_SECONDS = 600.0

FIRST_DELAY_SECONDS = 0.5
"""The wait before the second start in a window; it doubles with each.  The first comes at once."""

MAX_DELAY_SECONDS = 4.0
"""Between attempts to start a process that the system does not allow.  They cost nothing, so they never end."""


@dataclass(slots=True)
class Restarts:
    """The deaths of one process and its successors."""

    _deaths: deque[float] = field(default_factory=deque)
    _failed_starts: int = 0

    @property
    def deaths(self) -> int:
        """In the window before the last one."""
        return len(self._deaths)

    def delay_after_death(self, now: float) -> float | None:
        """Seconds to wait before the next start; None to start it no more.

        Args:
            now: when it died, in seconds.
        """
        self._failed_starts = 0
        self._deaths.append(now)
        while self._deaths[0] < now - WINDOW_SECONDS:
            self._deaths.popleft()
        if self.deaths >= MOST_DEATHS:
            return None
        return 0.0 if self.deaths == 1 else FIRST_DELAY_SECONDS * 2.0 ** (self.deaths - 2)

    def delay_after_failed_start(self) -> float:
        """Seconds to wait before the next attempt to start a process that could not even be created."""
        self._failed_starts += 1
        return min(FIRST_DELAY_SECONDS * 2.0 ** (self._failed_starts - 1), MAX_DELAY_SECONDS)
