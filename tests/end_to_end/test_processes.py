"""What happens to clients when a process of the server ends, by request or by accident."""

import os
import re
import select
import signal

import httpx
import pytest

LONG = {"prompt": "human: Hello!\n\nadept:", "max_tokens": 2000, "ignore_eos": True, "stream": True}


def first_event(response: httpx.Response) -> str:
    return next(line for line in response.iter_lines() if line.startswith("data: "))


def test_a_killed_engine_ends_open_requests_with_an_error_and_the_server(fresh):
    with httpx.stream("POST", f"{fresh.url}/v1/completions", json=LONG, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        os.kill(fresh.children()["engine"], signal.SIGKILL)
        events = [line for line in lines if line.startswith("data: ")]
    assert '"error"' in events[-1]
    assert "[DONE]" not in events[-1]
    assert fresh.wait() == 1
    assert any("engine process ended" in line for line in fresh.lines)


def test_a_killed_api_worker_ends_the_server(fresh):
    os.kill(fresh.children()["api"], signal.SIGKILL)
    assert fresh.wait() == 1
    assert any("API process ended" in line for line in fresh.lines)


def test_no_process_outlives_a_killed_supervisor(fresh):
    children = fresh.children()
    descriptors = [os.pidfd_open(pid) for pid in children.values()]
    fresh.process.kill()
    for descriptor in descriptors:
        wait_for_exit(descriptor)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_an_open_stream_finish(fresh, number):
    body = LONG | {"max_tokens": 300, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{fresh.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        fresh.process.send_signal(number)
        fresh.wait_for_line(re.compile("Stopping"), 30)
        events = [line for line in lines if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert '"completion_tokens":300' in events[-2]
    assert fresh.wait() == 0
    assert not any("Traceback" in line or "leaked" in line for line in fresh.lines)


def test_a_second_signal_stops_at_once(fresh):
    with httpx.stream("POST", f"{fresh.url}/v1/completions", json=LONG | {"n": 8}, timeout=60) as response:
        assert first_event(response)
        fresh.process.send_signal(signal.SIGTERM)
        fresh.wait_for_line(re.compile("Stopping"), 30)
        fresh.process.send_signal(signal.SIGTERM)
        assert fresh.wait() == 0


def wait_for_exit(descriptor: int) -> None:
    readable, _, _ = select.select([descriptor], [], [], 30)
    os.close(descriptor)
    assert readable
