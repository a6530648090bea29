"""The command where no engine is needed: it refuses, or all is done."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from persimmon.server.cli import main
from persimmon.server.config import Settings
from persimmon.server.offline.batch_lines import encode, read_request, respond
from persimmon.server.offline.command import concurrency
from tests.server.offline.batch import completion, write_lines

OTHER_MODEL = "The model 'gpt-4o-mini' does not exist; this server serves 'demo'."


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", [completion("a"), completion("b")])


def write_output(path: Path, source: Path, statuses: dict[int, int]) -> Path:
    lines = source.read_bytes().splitlines()
    answers = [encode(respond(read_request(lines[index], 1), status, b"{}")) for index, status in statuses.items()]
    path.write_bytes(b"".join(answers))
    return path


def test_an_input_that_is_not_there_is_one_line_and_leaves_no_output(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert main(["generate", str(tmp_path / "nothing.jsonl"), str(out)]) == 2
    assert f"persimmon: error: cannot read {tmp_path / 'nothing.jsonl'}: No such file" in capsys.readouterr().err
    assert not out.exists()


def test_a_custom_id_that_is_there_twice_is_one_line(tmp_path, capsys):
    path = write_lines(tmp_path / "in.jsonl", [completion("a"), completion("a")])
    assert main(["generate", str(path), str(tmp_path / "out.jsonl")]) == 2
    assert "lines 1 and 2 have the same custom_id 'a'" in capsys.readouterr().err


def test_an_output_that_is_the_input_is_refused_and_left_alone(source, capsys):
    before = source.read_bytes()
    assert main(["generate", str(source), str(source)]) == 2
    assert "does not hold batch answers" in capsys.readouterr().err
    assert source.read_bytes() == before


def test_a_setting_that_cannot_be_is_refused(source, tmp_path, capsys):
    assert main(["generate", str(source), str(tmp_path / "out.jsonl"), "--block-size", "17"]) == 2
    assert "--block-size" in capsys.readouterr().err


def test_a_flag_of_listening_is_unknown(source, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(source), str(tmp_path / "out.jsonl"), "--port", "1"])
    assert ended.value.code == 2


@pytest.mark.parametrize(("status", "code"), [(200, 0), (400, 1)])
def test_where_all_is_answered_the_exit_code_says_how_without_an_engine(status, code, source, tmp_path, capsys):
    out = write_output(tmp_path / "out.jsonl", source, {1: 200, 0: status})
    before = out.read_bytes()
    assert main(["generate", str(source), str(out)]) == code
    console = capsys.readouterr().err
    assert "already has the answers of 2 of 2 lines" in console
    assert f"{out}: {'1 line' if code else '2 lines'} answered, {code} failed" in console
    assert out.read_bytes() == before


def test_the_console_says_why_lines_failed(tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", [completion(name) for name in "abc"])
    out = tmp_path / "out.jsonl"
    answers = []
    for line, reason in zip(source.read_bytes().splitlines(), ("Bad.", "Bad.", OTHER_MODEL), strict=True):
        body = json.dumps({"error": {"message": reason, "type": "a", "param": None, "code": None}}).encode()
        answers.append(encode(respond(read_request(line, 1), 400, body)))
    out.write_bytes(b"".join(answers))
    assert main(["generate", str(source), str(out)]) == 1
    assert (
        f"{out}: 0 lines answered, 3 failed\n  2 x Bad.\n  1 x {OTHER_MODEL} (--any-model answers such lines)\n"
    ) in capsys.readouterr().err


@pytest.mark.parametrize("most", [1, 4, 256])
def test_some_lines_wait_while_the_engine_is_full(most):
    settings = Settings(max_num_seqs=most)
    assert most < concurrency(settings) <= most * 5 // 4 + 8


def test_the_command_never_imports_torch():
    program = "import sys, persimmon.server.offline.command; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
