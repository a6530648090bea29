"""`persimmon bench` against a scripted server."""

import asyncio
import json
import os
import pty
import socket
import sys
import termios
from collections.abc import Iterator
from typing import Any

import pytest

from persimmon.server.bench import command
from persimmon.server.bench.arguments import number_range
from persimmon.server.bench.probe import refusal_of_token_ids, served_model
from persimmon.server.cli import main
from tests.server.bench.fake_server import FakeServer, fake_server, fake_server_in_a_thread, http_response

SHORT = ("--num-requests", "6", "--output-len", "4", "--warm-up", "2")


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def fake() -> Iterator[tuple[FakeServer, str]]:
    with fake_server_in_a_thread() as running:
        yield running


def refuse_ids(request: dict[str, Any]) -> bytes:
    if isinstance(request["prompt"], list):
        return http_response(b'{"error": {"message": "text only"}}', "400 Bad Request")
    return FakeServer.completion(request)


def test_a_closed_loop_is_measured_and_written(fake, tmp_path, capsys) -> None:
    server, url = fake
    out = tmp_path / "out.json"
    assert main(["bench", "--base-url", url, *SHORT, "--streams", "2,1", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert (result["model"], result["workload"]["form"]) == ("fake", "ids")
    assert [load["workload"]["streams"] for load in result["loads"]] == [2, 1]
    assert [load["answered"] for load in result["loads"]] == [6, 6]
    assert [load["output_tokens"] for load in result["loads"]] == [24, 24]
    _, *sent = server.prompts  # the first asks whether token ids are taken
    assert len(sent) == len(set(sent)) == 2 + 6 + 6
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows if len(row) == 13 and row[-1] == "0"] == ["2", "1"]


def test_an_open_loop_is_measured_and_drawn(fake, tmp_path, capsys) -> None:
    _, url = fake
    out, picture = tmp_path / "out.json", tmp_path / "plot.png"
    files = ("--out", str(out), "--plot", str(picture))
    assert main(["bench", "--base-url", url, *SHORT, "--rates", "2000,1000", *files]) == 0
    loads = json.loads(out.read_text())["loads"]
    assert [load["workload"]["rate"] for load in loads] == [2000, 1000]
    assert all(load["schedule_delay_ms"]["p99"] >= 0 for load in loads)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "ms late" in capsys.readouterr().out


def test_a_duration_ends_an_open_loop_at_the_arrivals_before_it(fake, tmp_path) -> None:
    server, url = fake
    load = ("--rate", "1000", "--duration", "0.02", "--seed", "3", "--warm-up", "0")
    assert main(["bench", "--base-url", url, "--output-len", "4", *load]) == 0
    sent = len(server.requests)
    assert sent > 5
    assert main(["bench", "--base-url", url, "--output-len", "4", *load]) == 0
    assert len(server.requests) == 2 * sent


def test_words_are_sent_where_token_ids_are_refused(fake, capsys) -> None:
    server, url = fake
    server.answer = refuse_ids
    assert main(["bench", "--base-url", url, *SHORT]) == 0
    assert {type(request["prompt"]) for request in server.requests[1:]} == {str}
    assert "does not accept these token ids: text only" in capsys.readouterr().err


def test_chat_is_sent_messages(fake) -> None:
    server, url = fake
    assert main(["bench", "--base-url", f"{url}/v1", *SHORT, "--endpoint", "chat", "--model", "mine"]) == 0
    assert all("messages" in request and request["model"] == "mine" for request in server.requests)
    assert {head.split()[1] for head in server.heads} == {b"/v1/models", b"/v1/chat/completions"}


def test_a_file_is_sent_once_and_its_answers_end_where_the_model_ends_them(fake, tmp_path) -> None:
    server, url = fake
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n')
    assert main(["bench", "--base-url", url, "--prompts", str(prompts), "--warm-up", "1", "--streams", "1"]) == 0
    assert [request.get("prompt", "b") for request in server.requests][1:] == ["a", "b"]
    assert not any("ignore_eos" in request for request in server.requests)


def test_a_failed_request_is_shown_and_ends_with_code_1(fake, capsys) -> None:
    server, url = fake
    server.answer = lambda request: http_response(b"full", "503 Busy")
    assert main(["bench", "--base-url", url, *SHORT]) == 1
    assert "6 x HTTP 503: full" in capsys.readouterr().out


def test_a_server_that_cannot_be_reached_is_one_line_and_code_2(capsys) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert main(["bench", "--base-url", url]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert f"persimmon: error: {url} cannot be reached" in printed.err


def test_the_key_of_the_environment_is_sent_and_written_nowhere(fake, tmp_path, monkeypatch, capsys) -> None:
    server, url = fake
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    out = tmp_path / "out.json"
    assert main(["bench", "--base-url", url, *SHORT, "--out", str(out)]) == 0
    assert all(b"Authorization: Bearer sk-secret" in head for head in server.heads)
    printed = capsys.readouterr()
    assert "secret" not in out.read_text() + printed.out + printed.err


def test_a_missing_matplotlib_is_said_before_anything_is_measured(fake, tmp_path, monkeypatch, capsys) -> None:
    server, url = fake
    monkeypatch.setattr(command, "can_plot", lambda: False)
    arguments = ["bench", "--base-url", url, "--rates", "1,2", "--plot", str(tmp_path / "plot.png")]
    assert main(arguments) == 2
    assert "pip install 'persimmon-server[bench]'" in capsys.readouterr().err
    assert server.heads == []


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (("--base-url", "localhost:8000"), "not a server URL"),
        (("--streams", "0"), "at least 1"),
        (("--rates", "0"), "more than 0"),
        (("--num-requests", "0"), "at least 1"),
        (("--duration", "nan"), "more than 0"),
        (("--warm-up", "-1"), "at least 0"),
        (("--input-len", "5:4"), "least <= most"),
        (("--prefix-len", "-1"), "at least 0"),
        (("--prompts", "/no/such/file"), "cannot be read"),
        (("--out", "/no/such/folder/file"), "cannot be written"),
        (("--rates", "1", "--plot", "plot.png"), "needs several"),
    ],
)
def test_arguments_that_make_no_sense_are_one_line_and_code_2(wrong, reason, capsys) -> None:
    assert main(["bench", *wrong]) == 2
    printed = capsys.readouterr().err
    assert reason in printed
    assert printed.count("\n") == 1


def test_progress_is_drawn_on_a_terminal_and_nowhere_else(fake, monkeypatch, capsys) -> None:
    _, url = fake
    assert main(["bench", "--base-url", url, *SHORT]) == 0
    assert capsys.readouterr().err == ""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert main(["bench", "--base-url", url, *SHORT]) == 0
        assert "8 streams" in os.read(ours, 4096).decode()
    os.close(ours)


def test_the_model_is_the_first_that_the_server_lists() -> None:
    async def run() -> None:
        async with fake_server() as (_, endpoint):
            assert await served_model(endpoint) == "fake"

    asyncio.run(run())


def test_token_ids_are_tried_with_the_least_and_the_greatest() -> None:
    async def run() -> None:
        async with fake_server() as (fake, endpoint):
            assert await refusal_of_token_ids(endpoint, "fake", (10, 20)) is None
            assert fake.prompts == [(10, 19)]
            fake.answer = refuse_ids
            assert await refusal_of_token_ids(endpoint, "fake", (10, 20)) == "text only"

    asyncio.run(run())


def test_lengths_are_a_number_or_a_range() -> None:
    assert number_range("64") == (64, 64)
    assert number_range("32:512") == (32, 512)
