"""How much each API key may ask at once and in a minute, counted for all API workers together.

Knows keys by their digests, workers by their number and requests as moments.
"""

import contextlib
import fcntl
import logging
import math
import mmap
import os
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO

from persimmon.server.http.errors import ApiError

logger = logging.getLogger(__name__)

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

    Workers that know the same keys share a file; a single worker uses its own memory.

    Args:
        keys: their digests.
        workers: how many.
        folder: of the file, private to this server; None for one worker.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, keys: Sequence[bytes], workers: int, folder: Path | None) -> None:
        self._rows = {key: row for row, key in enumerate(keys)}
        self._row_bytes = _TIME.size + workers * _COUNT.size
        self._workers = workers
        size = len(keys) * self._row_bytes
        self._file: BinaryIO | None = None
        if folder is not None:
            self._file = (folder / f"keys-{blake2b(b''.join(keys), digest_size=8).hexdigest()}").open("a+b")
            try:
                # Zeros for the worker that comes first; for the others it has its size already.  Allocated, because
                # where the disk is full a store into a sparse file is a SIGBUS.
                os.posix_fallocate(self._file.fileno(), 0, size)
            except OSError:
                self._file.close()
                raise
        self._memory = mmap.mmap(-1 if self._file is None else self._file.fileno(), size)

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def close(self) -> None:
        """Gives memory and file back."""
        self._memory.close()
        if self._file is not None:
            self._file.close()

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

    def times(self) -> Mapping[bytes, float]:
        """When each key's allowance is full again."""
        return {key: self.full_at(key) for key in self._rows}

    def full_at(self, key: bytes) -> float:
        """When a key's allowance is full again."""
        return float(_TIME.unpack_from(self._memory, self._rows[key] * self._row_bytes)[0])

    def set_full_at(self, key: bytes, moment: float) -> None:
        _TIME.pack_into(self._memory, self._rows[key] * self._row_bytes, moment)

    def running(self, key: bytes) -> int:
        """Requests of a key that all workers answer now."""
        places = (self._place(key, worker) for worker in range(self._workers))
        return sum(int(_COUNT.unpack_from(self._memory, place)[0]) for place in places)

    def set_running(self, key: bytes, worker: int, count: int) -> None:
        _COUNT.pack_into(self._memory, self._place(key, worker), count)

    def _place(self, key: bytes, worker: int) -> int:
        return self._rows[key] * self._row_bytes + _TIME.size + worker * _COUNT.size


class KeyLimiter:
    """Lets in what each key may ask.

    The rate is a bucket that holds a minute's allowance and fills evenly, so a client may spend it at once and then
    goes on at the even rate (the generic cell rate algorithm: one number for each key).

    Args:
        limits: of each key, the same for all.
        keys: their digests.
        worker: this worker's number.
        workers: how many there are.
        folder: where they share files; None for one worker.
        clock: seconds, on a clock that the workers share.
    """

    def __init__(
        self,
        limits: KeyLimits,
        keys: Sequence[bytes],
        worker: int = 0,
        workers: int = 1,
        folder: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._worker = worker
        self._workers = workers
        self._folder = folder
        self._clock = clock
        # What this worker answers for each key, those that are let in no more included.
        self._running: Counter[bytes] = Counter()
        self._ledger = self._opened(keys, {})

    def replace(self, keys: Sequence[bytes]) -> None:
        """Counts for these keys from now on.

        A key that stays keeps its rate allowance, and its open requests still count.  Workers count together again
        when all of them have these keys: a key that asks at one that has them and at one that has not yet is counted
        at each, for the milliseconds between.

        Args:
            keys: their digests.
        """
        before = self._ledger
        with before.locked():
            times = before.times()
        self._ledger = self._opened(keys, times)
        before.close()

    def _opened(self, keys: Sequence[bytes], times: Mapping[bytes, float]) -> _Ledger:
        """The ledger of these keys, with what this worker knows of them."""
        try:
            ledger = _Ledger(keys, self._workers, self._folder)
        except OSError as error:
            logger.error(
                "%s: %s; each API worker now counts the limits of API keys separately, until the keys are reloaded",
                self._folder,
                error.strerror,
            )
            ledger = _Ledger(keys, self._workers, None)
        with ledger.locked():
            for key in keys:
                # In place of what is there of a worker of this number that has died.
                ledger.set_running(key, self._worker, self._running[key])
                # Another worker may have these keys already, and have counted on.
                ledger.set_full_at(key, max(ledger.full_at(key), times.get(key, 0.0)))
        return ledger

    @contextlib.contextmanager
    def request(self, key: bytes) -> Iterator[None]:
        """Counts a request for the length of a block.

        Args:
            key: the digest of one of the keys.

        Raises:
            ApiError: a 429 that says which limit is reached and when to come again.
        """
        with self._ledger.locked():
            self._check_concurrent(key)
            self._take(key)
            self._count(key, 1)
        try:
            yield
        finally:
            self._count(key, -1)

    def _count(self, key: bytes, change: int) -> None:
        self._running[key] += change
        if key in self._ledger:  # else it has been taken away meanwhile
            self._ledger.set_running(key, self._worker, self._running[key])  # no other worker writes this number
        if not self._running[key]:
            del self._running[key]

    def _check_concurrent(self, key: bytes) -> None:
        most = self._limits.concurrent
        if most is not None and self._ledger.running(key) >= most:
            raise _too_many(f"This API key has reached its limit of {most} concurrent requests.", 1)

    def _take(self, key: bytes) -> None:
        rate = self._limits.per_minute
        if rate is None:
            return
        now = self._clock()
        full_at = max(self._ledger.full_at(key), now) + _MINUTE / rate
        wait = full_at - now - _MINUTE
        if wait > 1e-9:
            raise _too_many(
                f"This API key has reached its limit of {rate} requests per minute.", max(1, math.ceil(wait))
            )
        self._ledger.set_full_at(key, full_at)


def _too_many(message: str, retry_after: int) -> ApiError:
    return ApiError(
        HTTPStatus.TOO_MANY_REQUESTS,
        f"{message} Please try again in {retry_after} s.",
        type="rate_limit_error",
        code="rate_limit_exceeded",
        retry_after=retry_after,
    )
