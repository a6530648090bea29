import contextlib
import os
from collections.abc import Iterator

import pytest

from persimmon.server.log_writer import LogWriter

SECONDS = 60.0
LINE = "x" * 99


def notice(lines: int) -> str:
    return f"{lines} dropped"


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """The two ends of a pipe; what is still open of it is closed."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            with contextlib.suppress(OSError):
                os.close(end)


def read_lines(descriptor: int, count: int) -> list[str]:
    """Exactly `count` lines."""
    with os.fdopen(os.dup(descriptor), "rb", buffering=0) as file:
        text = b""
        while text.count(b"\n") < count:
            text += file.read(65536)
    assert text.count(b"\n") == count
    return text.decode().splitlines()


def test_lines_are_written_in_their_order():
    with pipe() as (reader, end):
        writer = LogWriter(end, notice)
        for index in range(300):
            writer.put(f"line {index}")
        writer.close(SECONDS)
        assert read_lines(reader, 300) == [f"line {index}" for index in range(300)]


@pytest.mark.parametrize("blocking", [True, False])
def test_a_reader_that_stops_delays_nothing_and_learns_what_it_has_missed(blocking):
    with pipe() as (reader, end):
        os.set_blocking(end, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(end, b"." * 4096)
        os.set_blocking(end, blocking)
        writer = LogWriter(end, notice, max_waiting_bytes=10_000)
        count = 0
        while not writer.dropped:
            writer.put(f"{count:06} {LINE}")
            count += 1
        for _ in range(9):
            writer.put(f"dropped {LINE}")
        kept = count - 1
        lines = read_lines(reader, kept + 1)
        lines[0] = lines[0].lstrip(".")
        assert lines[:-1] == [f"{index:06} {LINE}" for index in range(kept)]
        assert lines[-1] == "10 dropped"
        writer.put("the next")
        assert read_lines(reader, 1) == ["the next"]
        assert writer.dropped == 10
        writer.close(SECONDS)


def test_a_file_that_cannot_be_written_loses_lines_until_it_can():
    with pipe() as (reader, end), pipe() as (other_reader, other_end):
        os.close(reader)
        writer = LogWriter(end, notice)
        for index in range(3):
            writer.put(f"lost {index}")
            writer.flush(SECONDS)
        assert writer.dropped == 3
        os.dup2(other_end, end)
        writer.put("found")
        assert read_lines(other_reader, 2) == ["3 dropped", "found"]
        writer.close(SECONDS)


def test_a_single_line_may_be_longer_than_the_queue():
    with pipe() as (reader, end):
        writer = LogWriter(end, notice, max_waiting_bytes=10)
        writer.put(LINE)
        assert read_lines(reader, 1) == [LINE]
        writer.close(SECONDS)
