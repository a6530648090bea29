"""What the processes of a server tell one another through shared memory: heartbeats, and each worker's load.

It costs a store to write and nothing to read, and it can be read when a process hangs.  Every cell has one writer.
Knows nothing of what a step or a request is.
"""

import mmap
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from persimmon.server.runtime_folder import RuntimeFolderError

_FIRST_CELLS = 1  # the number of engines, from which the places of all others follow
_ENGINE_CELLS = 2  # when it last ended a step; since when it has had work
_WORKER_CELLS = 3  # its sequences; their prompt tokens to be computed; its last beat; and then, for each engine:
_SHARE_CELLS = 3  # its sequences there; the tokens to be computed there; since when it has had sequences there
_CELL_BYTES = 8


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What API workers want of the engines at a moment.

    Attributes:
        sequences: submitted, and neither finished nor aborted.
        prompt_tokens: tokens of those prompts that have not got their first output.
    """

    sequences: int
    prompt_tokens: int


class Vitals:
    """Cells of 64 bits that all processes of a server share.

    Args:
        memory: theirs, made by `create` or `private`.
        clock: nanoseconds, on a clock that the processes share; Linux has one CLOCK_MONOTONIC for all.

    Attributes:
        engines: how many engines there are.
    """

    def __init__(self, memory: mmap.mmap, clock: Callable[[], int] = time.monotonic_ns) -> None:
        # Aligned stores of 64 bits, which no reader sees half.
        self._cells = memoryview(memory).cast("q")
        self._clock = clock
        self.engines = self._cells[0]
        self._workers = _FIRST_CELLS + self.engines * _ENGINE_CELLS
        self._stride = _WORKER_CELLS + self.engines * _SHARE_CELLS

    @classmethod
    def create(cls, path: Path, workers: int, engines: int = 1) -> "Vitals":
        """Makes the file that the other processes open.

        Raises:
            RuntimeFolderError: it cannot be written.
        """
        try:
            with path.open("xb") as file:
                # A sparse file would be a SIGBUS later, where the disk is full.
                os.posix_fallocate(file.fileno(), 0, _size(workers, engines))
                file.write(engines.to_bytes(_CELL_BYTES, sys.byteorder))
            return cls.open(path)
        except OSError as error:
            raise RuntimeFolderError(
                f"{path} cannot be written: {error.strerror}; free space there or set TMPDIR"
            ) from None

    @classmethod
    def open(cls, path: Path) -> "Vitals":
        """What another process has created."""
        with path.open("r+b") as file:
            return cls(mmap.mmap(file.fileno(), 0))

    @classmethod
    def private(cls, workers: int = 1, clock: Callable[[], int] = time.monotonic_ns, engines: int = 1) -> "Vitals":
        """Of a single process."""
        memory = mmap.mmap(-1, _size(workers, engines))
        memory[:_CELL_BYTES] = engines.to_bytes(_CELL_BYTES, sys.byteorder)
        return cls(memory, clock)

    def beat(self, busy: bool, engine: int = 0) -> None:
        """An engine is well; called by it when a step has ended.

        Args:
            busy: whether it has work, so that it will be asked for its next beat.
            engine: its number.
        """
        now = self._clock()
        place = self._engine(engine)
        self._cells[place] = now
        if not busy:
            self._cells[place + 1] = 0
        elif not self._cells[place + 1]:
            self._cells[place + 1] = now

    def tell(self, worker: int, load: WorkerLoad) -> None:
        """All that a worker wants of the engines now, what it has not submitted yet included; called by it."""
        place = self._worker(worker)
        self._cells[place] = load.sequences
        self._cells[place + 1] = load.prompt_tokens

    def tell_of(self, worker: int, engine: int, load: WorkerLoad) -> None:
        """What a worker has submitted to an engine, and is still to come of it; called by the worker."""
        place = self._worker(worker) + _WORKER_CELLS + engine * _SHARE_CELLS
        self._cells[place] = load.sequences
        self._cells[place + 1] = load.prompt_tokens
        if not load.sequences:
            self._cells[place + 2] = 0
        elif not self._cells[place + 2]:
            self._cells[place + 2] = self._clock()

    def beat_worker(self, worker: int) -> None:
        """A worker's event loop turns; called by it."""
        self._cells[self._worker(worker) + 2] = self._clock()

    def silent_seconds(self, worker: int) -> float | None:
        """How long ago a worker's event loop last turned; None where it has not yet."""
        last = self._cells[self._worker(worker) + 2]
        return max(0.0, (self._clock() - last) / 1e9) if last else None

    @property
    def load(self) -> WorkerLoad:
        """Of all workers."""
        return self._sum(self._workers)

    def load_of(self, engine: int) -> WorkerLoad:
        """What all workers have submitted to an engine."""
        return self._sum(self._workers + _WORKER_CELLS + engine * _SHARE_CELLS)

    def overdue_seconds(self, engine: int = 0) -> float:
        """How long an engine has had work without finishing a step; 0 if it has no work."""
        place = self._engine(engine)
        share = self._workers + _WORKER_CELLS + engine * _SHARE_CELLS
        since = [when for when in self._cells[share + 2 :: self._stride] if when]
        if self._cells[place + 1]:
            since.append(self._cells[place + 1])
        if not since:
            return 0.0
        return max(0.0, (self._clock() - max(self._cells[place], min(since))) / 1e9)

    def forget_engine(self, engine: int = 0) -> None:
        """An engine has ended; called by the supervisor, before it starts another in its place."""
        place = self._engine(engine)
        self._cells[place] = self._cells[place + 1] = 0

    def forget_worker(self, worker: int) -> None:
        """A worker has ended; called by the supervisor, before it starts another."""
        nothing = WorkerLoad(0, 0)
        self.tell(worker, nothing)
        for engine in range(self.engines):
            self.tell_of(worker, engine, nothing)
        self._cells[self._worker(worker) + 2] = 0

    def _engine(self, engine: int) -> int:
        return _FIRST_CELLS + engine * _ENGINE_CELLS

    def _worker(self, worker: int) -> int:
        return self._workers + worker * self._stride

    def _sum(self, first: int) -> WorkerLoad:
        return WorkerLoad(sum(self._cells[first :: self._stride]), sum(self._cells[first + 1 :: self._stride]))


def _size(workers: int, engines: int) -> int:
    share = _WORKER_CELLS + engines * _SHARE_CELLS
    return (_FIRST_CELLS + engines * _ENGINE_CELLS + workers * share) * _CELL_BYTES
