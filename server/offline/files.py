"""The two files of a batch: lines to answer, and the answers so far.

Reads line by line and remembers 16 bytes a line, for files may have millions.  Knows nothing of engines.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from server.config import MAX_BODY_BYTES
from server.offline.batch_lines import ANSWER_START, BatchAnswer, custom_id, encode, key, read_answer

MAX_LINE_BYTES = MAX_BODY_BYTES + 2**16
"""What is longer holds a body that no endpoint takes."""


class BatchFileError(ValueError):
    """A file that cannot be used.  The message is one line for the person who named it."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the input.

    Attributes:
        number: from 1.
        text: its bytes; None where they are more than MAX_LINE_BYTES.
    """

    number: int
    text: bytes | None

    @property
    def custom_id(self) -> str | None:
        """The line's name, where one can be read."""
        return None if self.text is None else custom_id(self.text)


class BatchInput:
    """A file of requests that has been read once: every custom_id in it is there once.

    Args:
        path: of the file.

    Attributes:
        path: of the file.
        lines: how many there are, empty ones aside.

    Raises:
        BatchFileError: the file cannot be read, or holds a custom_id twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = 0
        seen: set[bytes] = set()
        for line in self:
            self.lines += 1
            if (name := line.custom_id) is None:
                continue
            digest = key(name, None)
            if digest in seen:
                first = next(each.number for each in self if each.custom_id == name)
                raise BatchFileError(
                    f"{path}: lines {first} and {line.number} have the same custom_id {name!r}; "
                    "give each line one of its own"
                )
            seen.add(digest)

    def __iter__(self) -> Iterator[Line]:
        """The lines, empty ones aside.

        Raises:
            BatchFileError: the file cannot be read.
        """
        try:
            with open_regular(self.path, os.O_RDONLY, "rb") as file:
                number = 0
                while text := file.readline(MAX_LINE_BYTES + 1):
                    number += 1
                    if len(text) > MAX_LINE_BYTES:
                        while text and not text.endswith(b"\n"):
                            text = file.readline(MAX_LINE_BYTES)
                        yield Line(number, None)
                    elif stripped := text.strip():
                        yield Line(number, stripped)
        except OSError as error:
            raise BatchFileError(f"cannot read {self.path}: {error.strerror or error}") from None


class BatchOutput:
    """A file of answers that is added to.  What it held before is kept, but for a last line that was never ended.

    Holds the file alone as long as it is open.

    Args:
        path: of the file; where there is none it is made.

    Attributes:
        path: of the file.
        answered: answers so far, of earlier runs too, that are what was asked for.
        failed: the other ones.

    Raises:
        BatchFileError: the file cannot be written, is in use, or is something else than answers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answered = 0
        self.failed = 0
        self._done: set[bytes] = set()
        with contextlib.ExitStack() as opened:
            try:
                self._file = opened.enter_context(open_regular(path, os.O_RDWR | os.O_CREAT, "r+b"))
                self._lock()
                self._read()
            except OSError as error:
                raise BatchFileError(f"cannot write {path}: {error.strerror or error}") from None
            opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        # A write that failed, as on a full disk, would fail once more; what it left is a line without an end.
        with contextlib.suppress(OSError):
            self._file.close()

    def __contains__(self, line: Line) -> bool:
        """Whether a line of the input has its answer."""
        return key(line.custom_id, line.number) in self._done

    @property
    def lines(self) -> int:
        """Answers so far, of earlier runs too."""
        return self.answered + self.failed

    def missing(self, source: BatchInput) -> int:
        """How many lines of the input have no answer."""
        return sum(line not in self for line in source) if self._done else source.lines

    def write(self, answer: BatchAnswer) -> None:
        """Adds an answer, which is in the file when this returns.

        Raises:
            BatchFileError: it cannot be written.
        """
        try:
            self._file.write(encode(answer))
            self._file.flush()
        except OSError as error:
            raise BatchFileError(
                f"cannot write {self.path}: {error.strerror or error}; the same command goes on from here"
            ) from None
        self._count(answer)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchFileError(f"{self.path} is being written by another persimmon generate") from None

    def _read(self) -> None:
        whole = 0
        for number, text in enumerate(self._file, 1):
            if not text.endswith(b"\n"):
                if not (text.startswith(ANSWER_START) or ANSWER_START.startswith(text)):
                    raise self._another_format(number, "it has no end")
                break
            try:
                answer = read_answer(text)
            except ValueError as error:
                raise self._another_format(number, str(error)) from None
            self._count(answer)
            self._done.add(key(answer.custom_id, None if answer.error is None else answer.error.line))
            whole += len(text)
        self._file.seek(whole)
        self._file.truncate()

    def _another_format(self, number: int, reason: str) -> BatchFileError:
        return BatchFileError(
            f"{self.path} holds something else than a batch's answers (line {number}: {reason}); name another file"
        )

    def _count(self, answer: BatchAnswer) -> None:
        if answer.failed:
            self.failed += 1
        else:
            self.answered += 1


def open_regular(path: Path, flags: int, mode: str) -> BinaryIO:
    """Opens a file that can be read twice and cut, which a pipe cannot.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is no regular file")
    return os.fdopen(descriptor, mode)  # type: ignore[return-value]
