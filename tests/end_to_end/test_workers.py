"""A server of two API workers: clients cannot see which one answers."""

import contextlib
import json
import os
import re
import signal
from collections.abc import Callable

import httpx
import psutil
import pytest

from tests.end_to_end.serving import Server, serving
from tests.end_to_end.test_processes import LONG, is_healthy, wait_until

ASKED = {"prompt": "human: What does galaxy mean?\n\nadept:", "max_tokens": 12, "return_token_ids": True}
VARIED = {"prompt": "the", "max_tokens": 24, "temperature": 2, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def two():
    with serving("--kv-cache-memory", "26MB", "--max-num-seqs", "8", "--api-workers", "2") as server:
        yield server


@pytest.fixture
def doomed():
    with serving("--kv-cache-memory", "64MB", "--api-workers", "2", "--worker-timeout", "4") as server:
        yield server


def worker_of(server: Server, client: httpx.Client) -> int:
    """The process id of the worker that holds a client's one open connection."""
    (stream,) = [
        request
        for request in client._transport._pool.connections  # type: ignore[attr-defined]
        if not request.is_closed()
    ]
    port = stream._connection._network_stream.get_extra_info("client_addr")[1]
    for name, process in server.children().items():
        if name != "engine":
            for connection in psutil.Process(process).net_connections("tcp"):
                if connection.raddr and connection.raddr.port == port:
                    return process
    raise AssertionError(f"no worker has a connection from port {port}")


@contextlib.contextmanager
def clients(server: Server, connect: Callable[[], httpx.Client] | None = None):
    """A client of each worker, by its process id: connections are opened until both have one."""
    workers = {process for name, process in server.children().items() if name != "engine"}
    with contextlib.ExitStack() as stack:
        found: dict[int, httpx.Client] = {}
        while found.keys() != workers:
            client = stack.enter_context(connect() if connect else httpx.Client(base_url=server.url, timeout=60))
            client.get("/livez")
            found.setdefault(worker_of(server, client), client)
        yield [found[worker] for worker in sorted(workers)]


def without_identity(answer: httpx.Response) -> dict:
    assert answer.status_code == 200, answer.text
    return {key: value for key, value in answer.json().items() if key not in ("id", "created", "usage")}


def test_both_workers_give_the_answer_that_one_alone_gives(two, demo):
    for change in ({"temperature": 0}, {"temperature": 1.4, "seed": 20}):
        expected = without_identity(httpx.post(f"{demo.url}/v1/completions", json=ASKED | change, timeout=60))
        with clients(two) as workers:
            answers = [worker.post("/v1/completions", json=ASKED | change) for worker in workers]
            assert len({answer.json()["id"] for answer in answers}) == 2
            assert [without_identity(answer) for answer in answers] == [expected, expected]
            models = [worker.get("/v1/models").json() for worker in workers]
            assert models[0] == models[1]


def test_requests_without_a_seed_draw_differently_at_each_worker(two):
    with clients(two) as workers:
        answers = [
            worker.post("/v1/completions", json=VARIED).json()["choices"][0]["token_ids"]
            for worker in workers
            for _ in range(3)
        ]
    assert len({tuple(answer) for answer in answers}) == 6


def test_metrics_are_of_the_whole_server_whichever_worker_is_asked(two):
    answered = 'persimmon_http_requests_total{endpoint="/v1/completions",status="200"}'
    with clients(two) as workers:

        def scrapes() -> list[list[str]]:
            two.wait_until_idle()
            texts = [worker.get("/metrics").text for worker in workers]
            return [[line for line in text.splitlines() if '"/metrics"' not in line] for text in texts]

        def count(lines: list[str]) -> float:
            return sum(float(line.split()[1]) for line in lines if line.startswith(answered))

        before = scrapes()
        for turn, worker in enumerate(workers):
            for _ in range(turn + 1):
                worker.post("/v1/completions", json=ASKED)
        after = scrapes()
    assert before[0] == before[1]
    assert after[0] == after[1]
    assert count(after[0]) == count(before[0]) + 3


def test_a_signal_lets_the_open_streams_of_both_workers_finish(doomed):
    body = LONG | {"max_tokens": 300, "stream_options": {"include_usage": True}}
    with clients(doomed) as workers, contextlib.ExitStack() as stack:
        streams = [stack.enter_context(each.stream("POST", "/v1/completions", json=body)) for each in workers]
        lines = [stream.iter_lines() for stream in streams]
        for each in lines:
            assert next(each).startswith("data: ")
        doomed.process.send_signal(signal.SIGTERM)
        doomed.wait_for_line(re.compile("Stopping"), 30)
        for each in lines:
            events = [line for line in each if line.startswith("data: ")]
            assert events[-1] == "data: [DONE]"
            assert json.loads(events[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 300
    assert doomed.wait() == 0
    assert not any("Traceback" in line or "leaked" in line for line in doomed.lines)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_ends_its_own_streams_alone_and_another_takes_its_place(doomed, number):
    with clients(doomed) as (lost, other), contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(each.stream("POST", "/v1/completions", json=LONG | {"max_tokens": 1500}))
            for each in (lost, other)
        ]
        lines = [stream.iter_lines() for stream in streams]
        for each in lines:
            assert next(each).startswith("data: ")
        os.kill(worker_of(doomed, lost), number)
        events = [line for line in lines[1] if line.startswith("data: ")]
        assert events[-1] == "data: [DONE]"
        with pytest.raises(httpx.TransportError):
            list(lines[0])
    wait_until(lambda: is_healthy(doomed) and len(doomed.children()) == 3)
    doomed.wait_until_idle()
    with clients(doomed) as workers:
        for worker in workers:
            assert worker.post("/v1/completions", json=ASKED).status_code == 200
    assert any("ended with code -9" in line for line in doomed.lines)
