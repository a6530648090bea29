"""The two files of a batch: lines to answer, and the answers so far.

Reads line by line and remembers 16 bytes a line, for files may have millions.  Knows nothing of engines.
"""

import codecs
import contextlib
import fcntl
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from persimmon.server.offline.batch_lines import ANSWER_START, BatchAnswer, custom_id, encode, key, read_answer
from persimmon.server.offline.errors import BatchFileError
from persimmon.server.settings.engine import MAX_BODY_BYTES

MAX_LINE_BYTES = MAX_BODY_BYTES + 2**16
"""What is longer holds a body that no endpoint takes."""


MAX_REASONS = 1000
"""Different reasons of failures that are counted; a message may quote the line that it is about."""

SHOWN_REASONS = 5
MAX_REASON_LENGTH = 300

_OTHER_MODEL = re.compile("The model .* does not exist")
_OTHER_FILES = (
    (codecs.BOM_UTF16_LE, "in UTF-16", "save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "in UTF-16", "save it as UTF-8"),
    (b"\x1f\x8b", "compressed with gzip", "decompress it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "decompress it first"),
    (b"PK\x03\x04", "a zip archive", "unpack it first"),
)


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
                    "give each line a different one"
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
                    if number == 1:
                        text = self._without_mark(text)
                    if len(text) > MAX_LINE_BYTES:
                        while text and not text.endswith(b"\n"):
                            text = file.readline(MAX_LINE_BYTES)
                        yield Line(number, None)
                    elif stripped := text.strip():
                        yield Line(number, stripped)
        except OSError as error:
            raise BatchFileError(f"cannot read {self.path}: {error.strerror or error}") from None

    def _without_mark(self, begin: bytes) -> bytes:
        """The first line without the mark that Windows' tools put before UTF-8."""
        for mark, kind, remedy in _OTHER_FILES:
            if begin.startswith(mark):
                raise BatchFileError(f"{self.path} is {kind}; {remedy}")
        return begin.removeprefix(codecs.BOM_UTF8)


class BatchOutput:
    """A file of answers that is added to.  What it held before is kept, up to a line that was not written whole.

    Locks the file exclusively while it is open.

    Args:
        path: of the file; where there is none it is made.

    Attributes:
        path: of the file.
        answered: answers so far, of earlier runs too, that are what was asked for.
        failed: the other ones.
        failures: why those failed.

    Raises:
        BatchFileError: the file cannot be written, is in use, or is something else than answers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answered = 0
        self.failed = 0
        self.failures = Failures()
        self._done: set[bytes] = set()
        with contextlib.ExitStack() as opened:
            try:
                self._file = opened.enter_context(open_regular(path, os.O_RDWR | os.O_CREAT, "r+b"))
                self._lock()
                self._read()
                _sync_folder(path)
            except OSError as error:
                raise BatchFileError(f"cannot write {path}: {error.strerror or error}") from None
            opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        # A write that failed, as on a full disk, would fail once more; what it left is a line without an end.
        with contextlib.suppress(OSError):
            self._file.close()

    def sync(self) -> None:
        """Returns when all answers that were written are on the disk, and survive a power cut.

        Raises:
            BatchFileError: they cannot be written.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._not_written(error) from None

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
        """Adds an answer, which is in the file when this returns, and on the disk after `sync`.

        Raises:
            BatchFileError: it cannot be written.
        """
        try:
            self._file.write(encode(answer))
            self._file.flush()
        except OSError as error:
            raise self._not_written(error) from None
        self._count(answer)

    def _not_written(self, error: OSError) -> BatchFileError:
        return BatchFileError(
            f"cannot write {self.path}: {error.strerror or error}; run the same command again to continue"
        )

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchFileError(f"another `persimmon generate` is writing to {self.path}") from None

    def _read(self) -> None:
        whole = 0
        for number, text in enumerate(self._file, 1):
            if not text.endswith(b"\n") or b"\0" in text:
                # After a power cut a file may have its new length, but zeros in place of what was not yet on the disk.
                begin = text.partition(b"\0")[0]
                is_own = begin.startswith(ANSWER_START) or ANSWER_START.startswith(begin)
                if not is_own or (number == 1 and not begin and text.strip(b"\0")):
                    raise self._another_format(number, "it has no line break at its end")
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
        return BatchFileError(f"{self.path} does not hold batch answers (line {number}: {reason}); name another file")

    def _count(self, answer: BatchAnswer) -> None:
        if answer.failed:
            self.failed += 1
            self.failures.add(answer.failure)
        else:
            self.answered += 1


class Failures:
    """Why lines failed: how many for each reason, as far as there are few reasons."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._others = 0

    def add(self, reason: str) -> None:
        """Counts one more line."""
        if reason in self._counts or len(self._counts) < MAX_REASONS:
            self._counts[reason] += 1
        else:
            self._others += 1

    def lines(self) -> list[str]:
        """The most frequent reasons, for the console; one that --any-model would have mended says so."""
        most = self._counts.most_common(SHOWN_REASONS)
        others = self._others + self._counts.total() - sum(count for _, count in most)
        lines = [f"{count:,} x {_one_line(reason)}" for reason, count in most]
        return lines + ([f"{others:,} x other reasons; see the file"] if others else [])


def _one_line(reason: str) -> str:
    shown = " ".join(reason.split())
    hint = " (--any-model answers such lines)" if _OTHER_MODEL.match(shown) else ""
    return (shown if len(shown) <= MAX_REASON_LENGTH else f"{shown[:MAX_REASON_LENGTH]}…") + hint


def _sync_folder(path: Path) -> None:
    """Makes the file's name survive a power cut, where the folder's file system has that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_regular(path: Path, flags: int, mode: str) -> BinaryIO:
    """Opens a file that can be read twice and cut, which a pipe cannot.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is not a regular file")
    return os.fdopen(descriptor, mode)  # type: ignore[return-value]
