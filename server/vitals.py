"""What the processes of a server tell one another through shared memory: heartbeats, and each worker's load.

It costs a store to write and nothing to read, and it can be read when a process hangs.  Every cell has one writer.
Knows nothing of what a step or a request is.
"""

import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from persimmon.server.runtime_folder import RuntimeFolderError

_ENGINE_CELLS = 2  # when it last ended a step; since when it has had work
_WORKER_CELLS = 4  # its sequences; their prompt tokens to be computed; since when it has had sequences; its last beat
_CELL_BYTES = 8


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What API workers want of the engine at a moment.

    Attributes:
        sequences: submitted, and neither finished nor aborted.
        prompt_tokens: tokens of those prompts that have not got their first output.
    """

    sequences: int
    prompt_tokens: int


class Vitals:
    """Cells of 64 bits that all processes of a server share.

    Args:
        memory: theirs, zeros at first.
        clock: nanoseconds, on a clock that the processes share; Linux has one CLOCK_MONOTONIC for all.
    """

    def __init__(self, memory: mmap.mmap, clock: Callable[[], int] = time.monotonic_ns) -> None:
        # Aligned stores of 64 bits, which no reader sees half.
        self._cells = memoryview(memory).cast("q")
        self._clock = clock

    @classmethod
    def create(cls, path: Path, workers: int) -> "Vitals":
        """Makes the file that the other processes open.

        Raises:
            RuntimeFolderError: it cannot be written.
        """
        try:
            with path.open("xb") as file:
                # A sparse file would be a SIGBUS later, where the disk is full.
                os.posix_fallocate(file.fileno(), 0, _size(workers))
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
    def private(cls, workers: int = 1, clock: Callable[[], int] = time.monotonic_ns) -> "Vitals":
        """Of a single process."""
        return cls(mmap.mmap(-1, _size(workers)), clock)

    def beat(self, busy: bool) -> None:
        """The engine is well; called by it when a step has ended.

        Args:
            busy: whether it has work, so that it will be asked for its next beat.
        """
        now = self._clock()
        self._cells[0] = now
        if not busy:
            self._cells[1] = 0
        elif not self._cells[1]:
            self._cells[1] = now

    def tell(self, worker: int, load: WorkerLoad) -> None:
        """A worker's load now; called by it."""
        place = _ENGINE_CELLS + worker * _WORKER_CELLS
        self._cells[place] = load.sequences
        self._cells[place + 1] = load.prompt_tokens
        if not load.sequences:
            self._cells[place + 2] = 0
        elif not self._cells[place + 2]:
            self._cells[place + 2] = self._clock()

    def beat_worker(self, worker: int) -> None:
        """A worker's event loop turns; called by it."""
        self._cells[_ENGINE_CELLS + worker * _WORKER_CELLS + 3] = self._clock()

    def silent_seconds(self, worker: int) -> float | None:
        """How long ago a worker's event loop last turned; None where it has not yet."""
        last = self._cells[_ENGINE_CELLS + worker * _WORKER_CELLS + 3]
        return max(0.0, (self._clock() - last) / 1e9) if last else None

    @property
    def load(self) -> WorkerLoad:
        """Of all workers."""
        return WorkerLoad(
            sum(self._cells[_ENGINE_CELLS::_WORKER_CELLS]),
            sum(self._cells[_ENGINE_CELLS + 1 :: _WORKER_CELLS]),
        )

    @property
    def overdue_seconds(self) -> float:
        """How long the engine has had work without finishing a step; 0 if it has no work."""
        since = [when for when in self._cells[_ENGINE_CELLS + 2 :: _WORKER_CELLS] if when]
        if self._cells[1]:
            since.append(self._cells[1])
        if not since:
            return 0.0
        return max(0.0, (self._clock() - max(self._cells[0], min(since))) / 1e9)

    def forget_engine(self) -> None:
        """The engine has ended; called by the supervisor, before it starts another."""
        self._cells[0] = self._cells[1] = 0

    def forget_worker(self, worker: int) -> None:
        """A worker has ended; called by the supervisor, before it starts another."""
        self.tell(worker, WorkerLoad(0, 0))
        self._cells[_ENGINE_CELLS + worker * _WORKER_CELLS + 3] = 0


def _size(workers: int) -> int:
    return (_ENGINE_CELLS + workers * _WORKER_CELLS) * _CELL_BYTES
