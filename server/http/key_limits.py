"""How much each API key may ask at once and in a minute, counted for all API workers together.

Knows keys by their place, workers by their number and requests as moments.
"""

import contextlib
import fcntl
import math
import mmap
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from server.http.errors import ApiError

_MINUTE = 60.0
_TIME = struct.Struct("d")
_COUNT = struct.Struct("q")


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What one key may ask.

    Attributes:
        concurrent: requests at once; None for any number.
        per_minute: requests a minute; None for any number.
    """

    concurrent: int | None = None
    per_minute: int | None = None

    @property
    def any(self) -> bool:
        """Whether there is a limit at all."""
        return self.concurrent is not None or self.per_minute is not None


class _Ledger:
    """For each key when its allowance is full again, and how many requests each worker answers for it.

    Several workers share a file; one alone has memory of its own.

    Args:
        keys: how many.
        workers: how many.
        path: of the file, in a folder of this server alone; None for one worker.
    """

    def __init__(self, keys: int, workers: int, path: Path | None) -> None:
        self._row = _TIME.size + workers * _COUNT.size
        self._workers = workers
        size = keys * self._row
        self._file = None if path is None else path.open("a+b")
        if self._file is not None:
            self._file.truncate(size)  # zeros for who comes first; for the others it is so long already
        self._memory = mmap.mmap(-1 if self._file is None else self._file.fileno(), size)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """A block in which no other worker reads or writes: some microseconds, so waiting is as good as a turn."""
        if self._file is None:
            yield
            return
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def full_at(self, key: int) -> float:
        """When a key's allowance is full again."""
        return float(_TIME.unpack_from(self._memory, key * self._row)[0])

    def set_full_at(self, key: int, moment: float) -> None:
        _TIME.pack_into(self._memory, key * self._row, moment)

    def running(self, key: int) -> int:
        """Requests of a key that all workers answer now."""
        return sum(self._count(key, worker) for worker in range(self._workers))

    def add(self, key: int, worker: int, count: int) -> None:
        _COUNT.pack_into(self._memory, self._place(key, worker), self._count(key, worker) + count)

    def clear(self, key: int, worker: int) -> None:
        """Forgets what a worker answers, because it has just begun."""
        _COUNT.pack_into(self._memory, self._place(key, worker), 0)

    def _count(self, key: int, worker: int) -> int:
        return int(_COUNT.unpack_from(self._memory, self._place(key, worker))[0])

    def _place(self, key: int, worker: int) -> int:
        return key * self._row + _TIME.size + worker * _COUNT.size


class KeyLimiter:
    """Lets in what each key may ask.

    The rate is a bucket that holds a minute's allowance and fills evenly, so a client may spend it at once and then
    goes on at the even rate (the generic cell rate algorithm: one number for each key).

    Args:
        limits: of each key, the same for all.
        keys: how many there are.
        worker: this worker's number.
        workers: how many there are.
        path: of a file that they share; None for one worker.
        clock: seconds, on a clock that the workers share.
    """

    def __init__(
        self,
        limits: KeyLimits,
        keys: int,
        worker: int = 0,
        workers: int = 1,
        path: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._worker = worker
        self._clock = clock
        self._ledger = _Ledger(keys, workers, path)
        for key in range(keys):
            self._ledger.clear(key, worker)

    @contextlib.contextmanager
    def request(self, key: int) -> Iterator[None]:
        """Counts a request for the length of a block.

        Args:
            key: its place among the keys.

        Raises:
            ApiError: a 429 that says which limit is reached and when to come again.
        """
        with self._ledger.locked():
            self._check_concurrent(key)
            self._take(key)
            self._ledger.add(key, self._worker, 1)
        try:
            yield
        finally:
            self._ledger.add(key, self._worker, -1)  # nobody else writes this number

    def _check_concurrent(self, key: int) -> None:
        most = self._limits.concurrent
        if most is not None and self._ledger.running(key) >= most:
            raise _too_many(f"This API key has {most} requests running, and may have no more at once.", 1)

    def _take(self, key: int) -> None:
        rate = self._limits.per_minute
        if rate is None:
            return
        now = self._clock()
        full_at = max(self._ledger.full_at(key), now) + _MINUTE / rate
        wait = full_at - now - _MINUTE
        if wait > 1e-9:
            raise _too_many(f"This API key may send {rate} requests a minute, and has.", max(1, math.ceil(wait)))
        self._ledger.set_full_at(key, full_at)


def _too_many(message: str, retry_after: int) -> ApiError:
    return ApiError(
        HTTPStatus.TOO_MANY_REQUESTS,
        f"{message} Please try again in {retry_after} s.",
        type="rate_limit_error",
        code="rate_limit_exceeded",
        retry_after=retry_after,
    )
