"""Real servers of two engines: what clients see when one dies, hangs or is stopped, and where their prompts go."""

import contextlib
import http.client
import json
import os
import re
import select
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.end_to_end.serving import Server, Start, serving

# The demo repeats itself, so with guesses an answer of 2,000 tokens would end within a few steps.
STREAM = {"ignore_eos": True, "stream": True, "speculate": False}
BLOCK = 32

CLIENT = httpx.Client(timeout=60)
"""For all requests: to make a client takes longer than a long answer."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Two engines and two API workers, which notice soon when an engine hangs."""
    arguments = ("--data-parallel-size", "2", "--api-workers", "2", "--kv-cache-memory", "128MB", "--step-timeout", "4")
    with serving(*arguments) as server:
        yield server


@pytest.fixture(autouse=True)
def whole(server: Server) -> None:
    """Each test begins with both engines."""
    wait_until(lambda: is_ready(server))


def wait_until(happened: Callable[[], bool], seconds: float = 60.0) -> None:
    """Asks until it is so.  Asking is a request to the server, which takes its time; there is nothing to sleep for."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline


def status(server: Server) -> tuple[int, str]:
    health = CLIENT.get(f"{server.url}/health")
    return health.status_code, health.json()["status"]


def is_ready(server: Server) -> bool:
    """Whether both engines serve, as all API workers see it: the kernel spreads new connections among them."""
    port = httpx.URL(server.url).port

    def seen() -> str:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            connection.request("GET", "/health")
            return str(json.load(connection.getresponse())["status"])

    return all(seen() == "ready" for _ in range(20))


def of_engines(server: Server, name: str) -> dict[int, float]:
    """A metric of each engine."""
    text = CLIENT.get(f"{server.url}/metrics").text
    return {int(number): float(value) for number, value in re.findall(rf'^{name}{{engine="(\d+)"}} (\S+)$', text, re.M)}


def complete(server: Server, prompt: list[int], max_tokens: int = 8, client: httpx.Client = CLIENT) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, "return_token_ids": True}
    response = client.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return dict(response.json())


class Stream:
    """A long answer that is being streamed."""

    def __init__(self, response: httpx.Response) -> None:
        self._lines = (line for line in response.iter_lines() if line.startswith("data: "))

    def next(self) -> str:
        return next(self._lines, "")

    def rest(self) -> list[str]:
        return list(self._lines)


@contextlib.contextmanager
def streams(server: Server, count: int, max_tokens: int = 2000) -> Iterator[list[Stream]]:
    """Streams that have begun, as many at one engine as at the other."""
    wait_until(lambda: is_ready(server))
    with contextlib.ExitStack() as stack:
        opened = []
        for number in range(count):
            body = STREAM | {"prompt": [300 + number] * 3, "max_tokens": max_tokens}
            response = stack.enter_context(CLIENT.stream("POST", f"{server.url}/v1/completions", json=body))
            opened.append(Stream(response))
            assert opened[-1].next()
        wait_until(lambda: of_engines(server, "persimmon_requests_running") == {0: count // 2, 1: count // 2})
        yield opened


def test_both_engines_compute(server: Server) -> None:
    before = of_engines(server, "persimmon_generated_tokens_total")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: complete(server, [300 + number] * 5), range(8)))
    after = of_engines(server, "persimmon_generated_tokens_total")
    assert sum(after.values()) - sum(before.values()) == 64
    assert all(after[number] > before[number] for number in (0, 1))


def test_the_turns_of_conversations_come_back_to_their_prefixes(server: Server) -> None:
    conversations = [[400 + number, 401] * 40 for number in range(6)]
    known = [0] * len(conversations)
    # On one connection, so that one worker has heard of what an engine caches before the next turn comes.
    with httpx.Client() as client:
        for turn in range(4):
            for number, conversation in enumerate(conversations):
                answer = complete(server, conversation, client=client)
                assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= known[number]
                known[number] = len(conversation) // BLOCK * BLOCK
                conversation += [*answer["choices"][0]["token_ids"], *[500 + turn] * 40]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_dies_or_hangs_ends_its_own_streams_and_no_others(
    server: Server, number: signal.Signals
) -> None:
    with streams(server, 4) as opened:
        engines = [pid for name, pid in server.children().items() if name.startswith("engine")]
        os.kill(engines[1], number)
        wait_until(lambda: status(server) == (200, "degraded"))
        wait_until(lambda: sorted(of_engines(server, "persimmon_engine_ready").values()) == [0, 1])
        complete(server, [600, 601])
        ends = [stream.rest()[-1] for stream in opened]
    failed = [json.loads(end.removeprefix("data: "))["error"]["code"] for end in ends if "error" in end]
    assert failed == ["engine_dead"] * 2
    assert ends.count("data: [DONE]") == 2
    wait_until(lambda: is_ready(server))
    assert engines[0] in server.spawned()
    assert engines[1] not in server.spawned()
    assert any(re.search(r"engine process \d ended with code -9", line) for line in server.lines)
    server.wait_until_idle()


def test_a_drain_lets_the_answers_of_all_engines_end() -> None:
    # As much time as a busy machine takes for 2,000 tokens.
    arguments = ("--data-parallel-size", "2", "--kv-cache-memory", "128MB", "--drain-timeout", "600")
    with serving(*arguments) as server, streams(server, 2) as opened:
        server.process.send_signal(signal.SIGTERM)
        assert [stream.rest()[-1] for stream in opened] == ["data: [DONE]"] * 2
        assert server.wait() == 0
        wait_until(lambda: not server.processes())


def test_no_engine_outlives_a_killed_supervisor_not_even_a_stopped_one() -> None:
    with serving("--data-parallel-size", "2", "--kv-cache-memory", "128MB") as server:
        descriptors = [os.pidfd_open(pid) for pid in server.spawned()]
        assert len(descriptors) == 3
        for pid in server.spawned():
            os.kill(pid, signal.SIGSTOP)
        server.process.kill()
        for descriptor in descriptors:
            assert select.select([descriptor], [], [], 30)[0]
            os.close(descriptor)


def test_a_start_that_the_settings_do_not_allow_is_explained_once() -> None:
    start = Start("--data-parallel-size", "2", "--kv-cache-memory", "100TB")
    assert start.wait() == 2
    (error,) = [line for line in start.lines if "error" in line]
    assert "--kv-cache-memory is" in error
