"""Which files a batch accepts, and what happens to their content."""

import codecs
import gzip
import json
import os
from pathlib import Path

import pytest

from persimmon.server.http.schemas.completions import CompletionRequest
from persimmon.server.http.schemas.parsing import parse
from persimmon.server.offline.batch_lines import LineError, encode, read_request, respond
from persimmon.server.offline.errors import BatchFileError
from persimmon.server.offline.files import (
    MAX_LINE_BYTES,
    MAX_REASONS,
    SHOWN_REASONS,
    BatchInput,
    BatchOutput,
    Failures,
)
from tests.server.offline.batch import completion, read_answers, write_lines


def answer(name: str, status: int = 200) -> bytes:
    body = b'{"custom_id":"%s","method":"POST","url":"/v1/completions","body":{}}' % name.encode()
    return encode(respond(read_request(body, 1), status, b"{}"))


def missing(path: Path, output: BatchOutput) -> list[int]:
    return [line.number for line in BatchInput(path) if line not in output]


def test_empty_lines_are_no_lines_but_count_in_numbers(tmp_path):
    source = BatchInput(write_lines(tmp_path / "in", ["", completion("a"), "  ", completion("b")]))
    assert source.lines == 2
    assert [line.number for line in source] == [2, 4]


def test_a_custom_id_that_is_there_twice_is_refused_with_both_lines(tmp_path):
    path = write_lines(tmp_path / "in", [completion("a"), "not json", completion("b"), completion("a")])
    with pytest.raises(BatchFileError, match="lines 1 and 4 have the same custom_id 'a'"):
        BatchInput(path)


def test_a_line_that_is_too_long_is_passed_over_without_being_kept(tmp_path):
    path = tmp_path / "in"
    with path.open("wb") as file:
        file.write(b'{"custom_id":"a"}\n')
        file.seek(2 * MAX_LINE_BYTES + 7)
        file.write(b"\n" + b'{"custom_id":"b"}')
    assert [(line.number, line.custom_id) for line in BatchInput(path)] == [(1, "a"), (2, None), (3, "b")]


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_an_input_that_cannot_be_read_twice_is_refused_by_name(kind, tmp_path):
    path = tmp_path / "in"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(BatchFileError, match=f"cannot read {path}: "):
        BatchInput(path)


@pytest.mark.parametrize("kind", ["in no folder", "folder", "pipe"])
def test_an_output_that_cannot_be_added_to_is_refused_by_name(kind, tmp_path):
    path = tmp_path / "out"
    if kind == "in no folder":
        path = path / "out"
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(BatchFileError, match=f"cannot write {path}: "):
        BatchOutput(path)


def test_answered_lines_are_known_again_and_counted(tmp_path):
    source = write_lines(tmp_path / "in", [completion(name) for name in "abc"])
    path = tmp_path / "out"
    path.write_bytes(answer("c") + answer("a", 400))
    with BatchOutput(path) as output:
        assert (output.answered, output.failed) == (1, 1)
        assert missing(source, output) == [2]
        assert output.missing(BatchInput(source)) == 1


@pytest.mark.parametrize("length", [1, 10, 30, -1])
def test_a_line_that_was_never_ended_is_dropped_and_done_again(length, tmp_path):
    source = write_lines(tmp_path / "in", [completion(name) for name in "ab"])
    path = tmp_path / "out"
    path.write_bytes(answer("a") + answer("b")[:length])
    with BatchOutput(path) as output:
        assert missing(source, output) == [2]
        output.write(respond(read_request(next(iter(BatchInput(source))).text or b"", 1), 200, b"{}"))
    assert [each["custom_id"] for each in read_answers(path)] == ["a", "a"]


@pytest.mark.parametrize("text", ["notes", '{"custom_id": "a"}\n', '{"a": 1}', "\n", '{"id": "1"'])
def test_a_file_of_something_else_is_refused_and_left_alone(text, tmp_path):
    path = tmp_path / "out"
    before = answer("a") + text.encode()
    path.write_bytes(before)
    with pytest.raises(BatchFileError, match=r"does not hold batch answers \(line 2: "):
        BatchOutput(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "tail",
    [
        b"\0" * 5000,
        answer("b")[:40] + b"\0" * 5000,
        b"\0" * 5000 + answer("b")[40:] + answer("c"),
        answer("b")[:40] + b"\0" * 9 + answer("b")[49:],
    ],
)
def test_zeros_that_a_power_cut_left_are_dropped_and_done_again(tail, tmp_path):
    source = write_lines(tmp_path / "in", [completion(name) for name in "abc"])
    path = tmp_path / "out"
    whole = answer("a")
    path.write_bytes(whole + tail)
    with BatchOutput(path) as output:
        assert missing(source, output) == [2, 3]
    assert path.read_bytes() == whole


def test_a_file_of_nothing_but_zeros_is_begun_anew(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"\0" * 5000)
    with BatchOutput(path) as output:
        assert output.lines == 0
    assert path.read_bytes() == b""


@pytest.mark.parametrize("begin", [b"\0\0\1", b"\0\0\n\0"])
def test_another_file_that_begins_with_zeros_is_left_alone(begin, tmp_path):
    path = tmp_path / "out"
    path.write_bytes(begin)
    with pytest.raises(BatchFileError, match="does not hold batch answers"):
        BatchOutput(path)
    assert path.read_bytes() == begin


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_mark_and_line_ends_of_windows_are_not_part_of_a_line(end, tmp_path):
    path = tmp_path / "in"
    lines = [json.dumps(completion(name)) for name in "ab"]
    path.write_bytes(codecs.BOM_UTF8 + end.join([*lines, "", ""]).encode())
    assert [(line.number, line.custom_id) for line in BatchInput(path)] == [(1, "a"), (2, "b")]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (json.dumps(completion("a")).encode("utf-16"), "in UTF-16; save it as UTF-8"),
        (gzip.compress(json.dumps(completion("a")).encode()), "compressed with gzip; decompress it first"),
    ],
    ids=["utf-16", "gzip"],  # gzip writes the time, and ids must not change
)
def test_a_file_in_another_encoding_is_named(content, reason, tmp_path):
    path = tmp_path / "in"
    path.write_bytes(content)
    with pytest.raises(BatchFileError, match=reason):
        BatchInput(path)


def test_reasons_of_failures_are_counted_and_bounded():
    failures = Failures()
    for number in range(3 * MAX_REASONS):
        failures.add(f"reason {number}")
        failures.add("It is\nwrong.")
    first, *others, last = failures.lines()
    assert first == f"{3 * MAX_REASONS:,} x It is wrong."
    assert len(others) == SHOWN_REASONS - 1
    assert last == f"{3 * MAX_REASONS - SHOWN_REASONS + 1:,} x other reasons; see the file"


def test_a_file_that_is_being_written_is_not_written_by_a_second_run(tmp_path):
    path = tmp_path / "out"
    with BatchOutput(path), pytest.raises(BatchFileError, match="another `persimmon generate` is writing"):
        BatchOutput(path)
    with BatchOutput(path) as output:
        assert output.lines == 0


def test_the_last_of_two_streams_decides_as_it_does_for_the_endpoint():
    body = b'{"prompt":"Hello","stream":false,"stream":true}'
    assert parse(body, CompletionRequest).stream
    with pytest.raises(LineError, match="cannot be streamed"):
        read_request(b'{"custom_id":"a","method":"POST","url":"/v1/completions","body":' + body + b"}", 1)
