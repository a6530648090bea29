"""Which files a batch takes, and what becomes of what is in them."""

import os
from pathlib import Path

import pytest

from server.http.parsing import parse
from server.http.protocol import CompletionRequest
from server.offline.batch_lines import LineError, encode, read_request, respond
from server.offline.files import MAX_LINE_BYTES, BatchFileError, BatchInput, BatchOutput
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
    with pytest.raises(BatchFileError, match=r"something else than a batch's answers \(line 2: "):
        BatchOutput(path)
    assert path.read_bytes() == before


def test_a_file_that_is_being_written_is_not_written_by_a_second_run(tmp_path):
    path = tmp_path / "out"
    with BatchOutput(path), pytest.raises(BatchFileError, match="another persimmon generate"):
        BatchOutput(path)
    with BatchOutput(path) as output:
        assert output.lines == 0


def test_the_last_of_two_streams_decides_as_it_does_for_the_endpoint():
    body = b'{"prompt":"Hello","stream":false,"stream":true}'
    assert parse(body, CompletionRequest).stream
    with pytest.raises(LineError, match="cannot be streamed"):
        read_request(b'{"custom_id":"a","method":"POST","url":"/v1/completions","body":' + body + b"}", 1)
