"""What happens to clients when a process of the server ends, by request or by accident."""

import contextlib
import os
import re
import resource
import select
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from persimmon.server.restarts import MAX_DEATHS
from tests.end_to_end.serving import Server, serving

LONG = {"prompt": "human: Hello!\n\nadept:", "max_tokens": 2000, "ignore_eos": True, "stream": True}


def first_event(response: httpx.Response) -> str:
    return next(line for line in response.iter_lines() if line.startswith("data: "))


@pytest.fixture(scope="module")
def sturdy():
    """A server that notices soon when its engine hangs."""
    with serving("--kv-cache-memory", "64MB", "--step-timeout", "5") as server:
        yield server


def wait_until(happened: Callable[[], bool], seconds: float = 60.0) -> None:
    """Asks until it is so.  Asking is a request to the server, which takes its time; there is nothing to sleep for."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline


@contextlib.contextmanager
def stopped(process: int) -> Iterator[None]:
    """Stops a process for the length of a block."""
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def is_healthy(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/health", timeout=30).status_code == 200
    except httpx.TransportError:  # the connection was that of a worker that has died
        return False


def answers(server: Server) -> bool:
    response = httpx.post(f"{server.url}/v1/completions", json={"prompt": "Hi", "max_tokens": 3}, timeout=60)
    return response.status_code == 200


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_dies_or_hangs_ends_open_requests_with_an_error_and_another_takes_its_place(sturdy, number):
    engine = sturdy.children()["engine"]
    with (
        ThreadPoolExecutor(1) as pool,
        httpx.stream("POST", f"{sturdy.url}/v1/completions", json=LONG, timeout=60) as response,
    ):
        plain = pool.submit(
            httpx.post, f"{sturdy.url}/v1/completions", json=LONG | {"stream": False, "n": 4}, timeout=60
        )
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        wait_until(lambda: sturdy.metrics()["persimmon_requests_running"] == 5)
        os.kill(engine, number)
        wait_until(lambda: not is_healthy(sturdy))
        events = [line for line in lines if line.startswith("data: ")]
        refused = plain.result()
    assert '"code":"engine_dead"' in events[-1]
    assert "[DONE]" not in events[-1]
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_dead"
    assert int(refused.headers["retry-after"]) > 0
    wait_until(lambda: is_healthy(sturdy))
    assert answers(sturdy)
    assert sturdy.children()["engine"] != engine
    assert any("engine process ended with code -9" in line for line in sturdy.lines)
    assert sturdy.wait_until_idle()["persimmon_engine_ready"] == 1


def test_another_api_worker_takes_the_place_of_one_that_dies(sturdy):
    worker = sturdy.children()["api"]
    with httpx.stream("POST", f"{sturdy.url}/v1/completions", json=LONG, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            list(lines)
    wait_until(lambda: is_healthy(sturdy))
    assert answers(sturdy)
    assert sturdy.children()["api"] != worker
    assert any("API process ended with code -9" in line for line in sturdy.lines)
    sturdy.wait_until_idle()  # what the dead one had asked for is forgotten


def test_a_long_prompt_and_idleness_are_no_reason_to_worry(sturdy):
    body = {"prompt": "word " * 1900, "max_tokens": 1}
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(httpx.post, f"{sturdy.url}/v1/completions", json=body, timeout=60) for _ in range(4)]
        while not all(each.done() for each in asked):
            assert is_healthy(sturdy)
    assert [each.result().status_code for each in asked] == [200] * 4
    before = sturdy.wait_until_idle()
    assert is_healthy(sturdy)
    assert sturdy.metrics()["persimmon_steps_total"] == before["persimmon_steps_total"]  # probes are not work


def test_a_start_that_the_system_does_not_allow_is_tried_again(sturdy):
    engine = sturdy.children()["engine"]
    allowed = resource.prlimit(sturdy.process.pid, resource.RLIMIT_NOFILE)
    # Fewer than are open, and more than it waits for: poll() refuses to wait for more than the limit.
    resource.prlimit(sturdy.process.pid, resource.RLIMIT_NOFILE, (8, allowed[1]))
    try:
        os.kill(engine, signal.SIGKILL)
        for _ in range(2):
            sturdy.wait_for_line(re.compile("the engine process cannot be started: Too many open files"), 60)
    finally:
        resource.prlimit(sturdy.process.pid, resource.RLIMIT_NOFILE, allowed)
    wait_until(lambda: is_healthy(sturdy))
    assert answers(sturdy)


def test_an_engine_that_dies_again_and_again_ends_the_server(fresh):
    others = {fresh.children()["api"]}
    for _ in range(MAX_DEATHS):
        wait_until(lambda: not others.issuperset(fresh.spawned()))
        (engine,) = set(fresh.spawned()) - others
        os.kill(engine, signal.SIGKILL)
        others.add(engine)
    assert fresh.wait() == 1
    (last,) = [line for line in fresh.lines if "the server exits" in line]
    assert f"death {MAX_DEATHS} in 10 minutes" in last


def test_no_process_and_no_file_outlives_a_killed_supervisor_not_even_a_stopped_process(fresh):
    children = fresh.children()
    descriptors = [os.pidfd_open(pid) for pid in children.values()]
    (sockets,) = {
        Path(file.path).parent for file in psutil.Process(children["api"]).memory_maps() if file.path.endswith("vitals")
    }
    assert (sockets / "engine").is_socket()
    for pid in children.values():
        os.kill(pid, signal.SIGSTOP)
    fresh.process.kill()
    for descriptor in descriptors:
        wait_for_exit(descriptor)
    assert not sockets.exists()


def wait_for_exit(descriptor: int) -> None:
    readable, _, _ = select.select([descriptor], [], [], 30)
    os.close(descriptor)
    assert readable
