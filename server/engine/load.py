"""What one API worker wants of the engines, counted as it changes, and how soon that will be done.

Knows no request: sequences and tokens come in and go out.
"""

import math
import time
from collections.abc import Callable

from persimmon.server.vitals import Vitals, WorkerLoad

_MEMORY_SECONDS = 10.0
"""How far back the rate of ended sequences looks."""


_NOTHING = WorkerLoad(0, 0)


class Load:
    """A worker's load, which the others see as soon as it changes.

    Args:
        vitals: where it is published.
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
        self._submitted = [WorkerLoad(0, 0)] * self._vitals.engines
        self._owners: dict[str, WorkerLoad] = {}
        self._ended = 0.0  # sequences, an older one counting less
        self._ended_at = clock()
        self._vitals.tell(worker, self._own)
        for engine, load in enumerate(self._submitted):
            self._vitals.tell_of(worker, engine, load)

    @property
    def own(self) -> WorkerLoad:
        """This worker's."""
        return self._own

    @property
    def total(self) -> WorkerLoad:
        """All workers'."""
        return self._vitals.load

    def of(self, owner: str) -> WorkerLoad:
        """What one client, by the name of its key, wants of the engines through this worker."""
        return self._owners.get(owner, _NOTHING)

    def of_engine(self, engine: int) -> WorkerLoad:
        """What all workers have submitted to an engine; of its prompts only the tokens that it has to compute."""
        return self._vitals.load_of(engine)

    def overdue_seconds(self, engine: int = 0) -> float:
        """For how long an engine has had work and ended no step."""
        return self._vitals.overdue_seconds(engine)

    def add(self, sequences: int, prompt_tokens: int, owner: str = "") -> None:
        """Counts more work; negative numbers are work that has ended.

        Args:
            sequences: how many more.
            prompt_tokens: how many more.
            owner: the name of the key that asks; empty without one.
        """
        self._own = _plus(self._own, sequences, prompt_tokens)
        if owner:
            self._owners[owner] = changed = _plus(self.of(owner), sequences, prompt_tokens)
            if changed == _NOTHING:
                del self._owners[owner]
        self._vitals.tell(self._worker, self._own)

    def submit(self, engine: int, sequences: int, computed_tokens: int) -> None:
        """Counts what an engine has more to do; negative numbers are work that has ended.

        Args:
            engine: its number.
            sequences: how many more.
            computed_tokens: how many more prompt tokens it has to compute, beyond those that it has cached.
        """
        self._submitted[engine] = changed = _plus(self._submitted[engine], sequences, computed_tokens)
        self._vitals.tell_of(self._worker, engine, changed)

    def end_one(self, owner: str = "") -> None:
        """An engine has finished a sequence of a client."""
        self._decay()
        self._ended += 1
        self.add(-1, 0, owner)

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


def _plus(load: WorkerLoad, sequences: int, prompt_tokens: int) -> WorkerLoad:
    return WorkerLoad(load.sequences + sequences, load.prompt_tokens + prompt_tokens)
