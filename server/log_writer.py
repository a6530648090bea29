"""Writes log lines to a descriptor from a thread of its own, so that a reader that stops reading stops nothing else.

Knows bytes and how many of them may wait; nothing of what a line says.
"""

import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

MAX_WAITING_BYTES = 1 << 20
"""Lines that wait for a slow reader, in each process; further ones are dropped and counted."""

_ATOMIC_BYTES = select.PIPE_BUF
"""What a pipe takes in one piece, so that lines of several processes do not mix."""


class LogWriter:
    """A bounded queue of lines, and the thread that writes them.

    Args:
        descriptor: of the file, pipe, socket or terminal to write to.
        notice: makes the line that says how many lines were dropped in its place.
        max_waiting_bytes: bound of the queue.

    Attributes:
        dropped: lines dropped so far.
    """

    def __init__(
        self, descriptor: int, notice: Callable[[int], str], max_waiting_bytes: int = MAX_WAITING_BYTES
    ) -> None:
        self._descriptor = descriptor
        self._notice = notice
        self._max_waiting_bytes = max_waiting_bytes
        self._lines: deque[_Line] = deque()
        self._waiting_bytes = 0  # of lines that are being written, too
        self._unreported = 0
        self._closed = False
        self.dropped = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="log-writer", daemon=True).start()

    def put(self, line: str) -> None:
        """Takes a line, without its newline, and returns at once."""
        added = _Line.of(line)
        with self._changed:
            if self._waiting_bytes and self._waiting_bytes + len(added.data) > self._max_waiting_bytes:
                self._drop([added])
                return
            self._append_notice()
            self._append(added)
            self._changed.notify_all()

    def flush(self, seconds: float) -> None:
        """Waits until all lines are written, or have been given up, but not longer than this."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while self._waiting_bytes and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)

    def close(self, seconds: float) -> None:
        """Flushes, and ends the thread if it is not held up."""
        self.flush(seconds)
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _append(self, line: "_Line") -> None:
        self._lines.append(line)
        self._waiting_bytes += len(line.data)

    def _append_notice(self) -> None:
        if self._unreported:
            self._append(_Line.of(self._notice(self._unreported), self._unreported))
            self._unreported = 0

    def _drop(self, lines: Iterable["_Line"]) -> None:
        for line in lines:
            self.dropped += not line.reported
            self._unreported += line.reported or 1

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._lines:
                    if self._closed:
                        return
                    self._changed.wait()
                batch = self._next_batch()
            written = self._write(b"".join(line.data for line in batch))
            with self._changed:
                self._waiting_bytes -= sum(len(line.data) for line in batch)
                if not written:  # for example a full disk, or a pipe that no process has open any more
                    self._drop(batch)
                elif not self._lines:
                    self._append_notice()
                self._changed.notify_all()

    def _next_batch(self) -> list["_Line"]:
        batch = [self._lines.popleft()]
        size = len(batch[0].data)
        while self._lines and size + len(self._lines[0].data) <= _ATOMIC_BYTES:
            batch.append(self._lines.popleft())
            size += len(batch[-1].data)
        return batch

    def _write(self, data: bytes) -> bool:
        """Waits as long as the reader takes; whether all of it was written."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # another program has made it non-blocking
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                with contextlib.suppress(OSError):
                    poll.poll()
            except OSError:
                return False
        return True


@dataclass(frozen=True, slots=True)
class _Line:
    """A line to write; `reported` is how many dropped lines it reports, 0 for any other line."""

    data: bytes
    reported: int = 0

    @classmethod
    def of(cls, line: str, reported: int = 0) -> "_Line":
        return cls(f"{line}\n".encode(errors="backslashreplace"), reported)
