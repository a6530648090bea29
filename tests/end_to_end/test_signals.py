"""Signals: to the server or to all its processes, while it serves, starts or stops."""

import re
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.serving import START_SECONDS, Start, serving
from tests.end_to_end.test_processes import LONG, stopped, wait_until


def test_a_signal_lets_an_open_stream_finish(fresh):
    body = LONG | {"max_tokens": 300, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{fresh.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        fresh.process.send_signal(signal.SIGTERM)
        fresh.wait_for_line(re.compile("Stopping"), 30)
        events = [line for line in lines if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert '"completion_tokens":300' in events[-2]
    assert fresh.wait() == 0
    assert not any("Traceback" in line or "leaked" in line for line in fresh.lines)


# SIGTERM to all is in the next test.
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_all_processes_is_a_signal_to_the_server(fresh, number):
    body = LONG | {"max_tokens": 300}
    with httpx.stream("POST", f"{fresh.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        fresh.signal_all(number)
        fresh.process.send_signal(number)  # as timeout(1) and other wrappers do
        events = [line for line in lines if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert fresh.wait() == 0
    assert not any("Traceback" in line for line in fresh.lines)


def test_a_second_signal_ends_open_streams_with_an_error(fresh):
    with httpx.stream("POST", f"{fresh.url}/v1/completions", json=LONG | {"n": 8}, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        fresh.signal_all(signal.SIGTERM)
        fresh.wait_for_line(re.compile("Stopping after open requests have finished"), 30)
        fresh.signal_all(signal.SIGTERM)
        events = [line for line in lines if line.startswith("data: ")]
    assert "the server is shutting down" in events[-1]
    assert fresh.wait() == 0


def test_sighup_while_the_server_stops_is_no_second_signal(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("alice:correct-horse\n")
    headers = {"Authorization": "Bearer correct-horse"}
    body = LONG | {"max_tokens": 300}
    with (
        serving("--kv-cache-memory", "64MB", "--api-key-file", str(keys)) as server,
        httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=60) as response,
    ):
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        with stopped(server.children()["engine"]):
            server.process.send_signal(signal.SIGTERM)
            server.wait_for_line(re.compile("after open requests have finished"), 30)
            server.process.send_signal(signal.SIGHUP)
            server.wait_for_line(re.compile("are not reloaded"), 30)
        events = [line for line in lines if line.startswith("data: ")]
        assert events[-1] == "data: [DONE]"
        assert server.wait() == 0


def test_a_stream_that_does_not_end_in_time_after_a_signal_ends_with_an_error():
    with (
        serving("--kv-cache-memory", "64MB", "--drain-timeout", "0.5") as server,
        httpx.stream("POST", f"{server.url}/v1/completions", json=LONG | {"n": 16}, timeout=60) as response,
    ):
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        server.process.send_signal(signal.SIGTERM)
        events = [line for line in lines if line.startswith("data: ")]
        assert "the server is shutting down" in events[-1]
        assert server.wait() == 0


def importing(start: Start) -> None:
    wait_until(lambda: "pydantic_core" in Path(f"/proc/{start.process.pid}/maps").read_text())


def starting_processes(start: Start) -> None:
    wait_until(lambda: len(start.processes()) > 2)


def loading(start: Start) -> None:
    start.wait_for_line(re.compile("^  checkpoint "), START_SECONDS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", [importing, starting_processes, loading])
def test_a_signal_during_the_start_ends_it_without_a_traceback_or_anything_left(moment, number, tmp_path):
    start = Start("--kv-cache-memory", "26MB", TMPDIR=str(tmp_path))
    moment(start)
    start.signal_all(number)
    assert start.wait() in (0, -number)
    wait_until(lambda: not start.processes())
    assert not any("Traceback" in line or "error" in line for line in start.lines)
    assert not list(tmp_path.iterdir())


def kill_during_its_start(moment: Callable[[Start], None], folder: Path) -> None:
    killed = Start("--kv-cache-memory", "26MB", TMPDIR=str(folder))
    moment(killed)
    killed.process.kill()
    killed.wait()
    wait_until(lambda: not killed.processes())


def test_a_server_killed_during_its_start_leaves_no_process_and_the_next_one_removes_its_files(tmp_path):
    for moment in (starting_processes, loading):
        kill_during_its_start(moment, tmp_path)
        assert len(list(tmp_path.iterdir())) <= 1  # not those of the one before
    next_one = Start("--kv-cache-memory", "26MB", TMPDIR=str(tmp_path))
    loading(next_one)
    assert len(list(tmp_path.iterdir())) == 1
    assert next_one.stop() == 0
    assert not list(tmp_path.iterdir())
