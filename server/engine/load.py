"""What one API worker wants of the engine, counted as it changes, and how soon that will be done.

Knows no request: sequences and tokens come in and go out.
"""

import math
import time
from collections.abc import Callable

from server.vitals import Vitals, WorkerLoad

_MEMORY_SECONDS = 10.0
"""How far back the rate of ended sequences looks."""


class Load:
    """A worker's load, which the others see as soon as it changes.

    Args:
        vitals: where it is told.
        worker: its number among the workers.
        clock: seconds.
    """

    def __init__(
        self, vitals: Vitals | None = None, worker: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._vitals = vitals or Vitals.private(worker + 1)
        self._worker = worker
        self._clock = clock
        self._own = WorkerLoad(0, 0)
        self._ended = 0.0  # sequences, an older one counting less
        self._ended_at = clock()
        self._vitals.tell(worker, self._own)

    @property
    def own(self) -> WorkerLoad:
        """This worker's."""
        return self._own

    @property
    def total(self) -> WorkerLoad:
        """All workers'."""
        return self._vitals.load

    @property
    def overdue_seconds(self) -> float:
        """For how long the engine has had work and ended no step."""
        return self._vitals.overdue_seconds

    def add(self, sequences: int, prompt_tokens: int) -> None:
        """So much more is wanted; negative numbers are wanted no more."""
        self._own = WorkerLoad(self._own.sequences + sequences, self._own.prompt_tokens + prompt_tokens)
        self._vitals.tell(self._worker, self._own)

    def end_one(self) -> None:
        """The engine has finished a sequence."""
        self._decay()
        self._ended += 1
        self.add(-1, 0)

    @property
    def seconds_to_drain(self) -> float:
        """How long a sequence that comes now stays in the server, by Little's law: in it over leaving."""
        if not self._own.sequences:
            return 0.0
        self._decay()
        return self._own.sequences * _MEMORY_SECONDS / self._ended if self._ended else math.inf

    def _decay(self) -> None:
        now = self._clock()
        self._ended *= math.exp((self._ended_at - now) / _MEMORY_SECONDS)
        self._ended_at = now
