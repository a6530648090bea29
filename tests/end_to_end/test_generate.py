"""`persimmon generate` as a process of its own: interrupted, killed, gone on with, and compared with a live server."""

import codecs
import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.server.offline.batch import completion, read_answers, texts, write_lines

WORDS = ("galaxy", "river", "fruit", "music", "stone", "letter")
ONE_AT_A_TIME = ("--max-num-seqs", "1", "--kv-cache-memory", "64MB")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Lines that take some seconds one after the other."""
    lines = [
        completion(f"{index}", prompt=f"human: {index} {WORDS[index % 6]}\n\nadept:", max_tokens=40, ignore_eos=True)
        for index in range(60)
    ]
    return write_lines(tmp_path_factory.mktemp("batch") / "in.jsonl", lines)


def command(source: Path, out: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "persimmon.server.cli", "generate", str(source), str(out), *arguments]


def start(source: Path, out: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(source, out, *arguments), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def until_answered(out: Path, process: subprocess.Popen[str]) -> None:
    """Returns when the first answer is in the file."""
    while process.poll() is None and not (out.exists() and out.stat().st_size):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code and what was printed."""
    try:
        _, console = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in console
    assert "leaked" not in console
    return process.returncode, console


def run_in_terminal(source: Path, out: Path) -> tuple[int, str]:
    """The exit code and what a person saw."""
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 110, 0, 0))
    shown = b""
    with subprocess.Popen(command(source, out), stdin=subprocess.DEVNULL, stderr=terminal) as process:
        os.close(terminal)
        with contextlib.suppress(OSError):  # the end of a terminal
            while part := os.read(master, 4096):
                shown += part
    os.close(master)
    return process.returncode, shown.decode()


def test_an_interrupted_batch_goes_on_and_its_answers_are_a_live_servers(source, demo, tmp_path):
    out = tmp_path / "out.jsonl"
    process = start(source, out, *ONE_AT_A_TIME)
    until_answered(out, process)
    process.send_signal(signal.SIGINT)
    code, console = finish(process)
    assert code == 130
    assert "run the same command again to continue" in console
    first = read_answers(out)
    assert 0 < len(first) < 60
    with out.open("a") as file:
        file.write('{"id":"batch_req_0123","custom_id":"59","resp')  # what a power cut leaves

    code, console = run_in_terminal(source, out)
    assert code == 0
    assert f"already has the answers of {len(first)} of 60 lines" in console
    assert re.search(r"  batch: 100%\|.*\| 60/60 \[.*, [\d,]+ tokens, [\d,]+/s\]", console)
    assert "60 lines answered, 0 failed" in console
    answers = read_answers(out)
    assert answers[: len(first)] == first
    assert len(answers) == 60

    def ask(line):
        return httpx.post(f"{demo.url}{line['url']}", json=line["body"], timeout=60).json()["choices"][0]["text"]

    lines = read_answers(source)
    with ThreadPoolExecutor(32) as threads:
        served = dict(zip((line["custom_id"] for line in lines), threads.map(ask, lines), strict=True))
    assert texts(answers) == served


def test_a_killed_engine_is_exit_code_1_and_leaves_whole_answers(source, tmp_path):
    out = tmp_path / "out.jsonl"
    process = start(source, out, *ONE_AT_A_TIME)
    until_answered(out, process)
    [engine] = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    engine.kill()
    code, console = finish(process)
    assert code == 1
    assert "the engine process ended with code -9; run the same command again to continue" in console
    assert all(answer["response"]["status_code"] == 200 for answer in read_answers(out))


def test_a_file_for_openais_batch_api_is_answered_and_the_console_says_what_failed(tmp_path):
    lines = [completion("good", model="gpt-4o-mini"), completion("bad", model="gpt-4o-mini", top_k="many")]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(codecs.BOM_UTF8 + "\r\n".join(map(json.dumps, lines)).encode())
    code, console = finish(start(source, out, "--any-model", "--kv-cache-memory", "64MB"))
    assert code == 1
    assert console.endswith(
        f"{out}: 1 line answered, 1 failed\n  1 x Invalid 'top_k': input should be a valid integer, not 'many'.\n"
    )
    statuses = {answer["custom_id"]: answer["response"]["status_code"] for answer in read_answers(out)}
    assert statuses == {"good": 200, "bad": 400}


def test_an_engine_that_cannot_start_says_why_with_exit_code_2(source, tmp_path):
    code, console = finish(start(source, tmp_path / "out.jsonl", "--max-model-len", "4096"))
    assert code == 2
    assert len([line for line in console.splitlines() if "error" in line]) == 1
