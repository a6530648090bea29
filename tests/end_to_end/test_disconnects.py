"""Clients that leave at any moment or hardly read: nothing of them stays, and their neighbours do not notice."""

import asyncio
import contextlib
import http.client
import io
import json
import random
import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from benchmarks.soak import soak
from persimmon.server.bench.http_client import Endpoint
from tests.end_to_end.serving import Server

pytestmark = pytest.mark.anyio

LEAVERS = 300
AT_ONCE = 50  # more than run at once, so that some leave the queue
NEIGHBOUR = {"prompt": "human: What does galaxy mean?\n\nadept:", "max_tokens": 40, "temperature": 0.9, "seed": 3}

BYTES_READ = 30
MAX_WORKER_BYTES = 8 * 2**20
LARGE = NEIGHBOUR | {"n": 8, "max_tokens": 250, "logprobs": 5, "ignore_eos": True}
"""Half a megabyte and more, however it is cut into events."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def leave(url: httpx.URL, dice: random.Random) -> None:
    """Asks for something and leaves: before the first byte, after some, or as the answer ends."""
    chat = dice.random() < 0.5
    text = "word " * dice.choice((1, 20, 300))
    body = {
        "max_tokens": dice.choice((1, 8, 200)),
        "n": dice.choice((1, 1, 1, 3)),
        "stream": dice.random() < 0.5,
        "ignore_eos": True,
    } | ({"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text})
    path = "/v1/chat/completions" if chat else "/v1/completions"
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(url.host, url.port)
    head = f"POST {path} HTTP/1.1\r\nHost: server\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    writer.write((head + content)[: dice.choice((None, None, None, -1, 40))])
    with contextlib.suppress(TimeoutError, ConnectionError, asyncio.IncompleteReadError):
        async with asyncio.timeout(dice.choice((0, 0.001, 0.01, 0.1, 0.5))):
            await reader.readexactly(dice.choice((1, 300, 3000)))
    if dice.random() < 0.5:
        writer.transport.abort()  # a reset instead of an end
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def test_hundreds_of_clients_that_leave_at_random_leave_nothing_behind(demo) -> None:
    async with httpx.AsyncClient(base_url=demo.url, timeout=60, headers={"Connection": "close"}) as client:

        async def neighbour() -> str:
            response = await client.post("/v1/completions", json=NEIGHBOUR)
            return str(response.json()["choices"][0]["text"])

        expected = await neighbour()
        worker = psutil.Process(demo.children()["api"])
        engine = psutil.Process(demo.children()["engine"])
        descriptors = worker.num_fds(), engine.num_fds()
        dice = random.Random(6)
        places = asyncio.Semaphore(AT_ONCE)

        async def leaver(number: int) -> None:
            async with places:
                await leave(httpx.URL(demo.url), random.Random(number))

        async with asyncio.TaskGroup() as tasks:
            for number in range(LEAVERS):
                tasks.create_task(leaver(dice.randrange(2**32) + number))
            stays = [tasks.create_task(neighbour()) for _ in range(3)]
        assert [task.result() for task in stays] == [expected] * 3
        await asyncio.to_thread(demo.wait_until_idle)
        async with asyncio.timeout(30):
            while worker.num_fds() > descriptors[0] or engine.num_fds() > descriptors[1]:  # noqa: ASYNC110 - the kernel closes them
                await asyncio.sleep(0.02)
        assert await neighbour() == expected


async def test_a_soak_tells_what_processes_hold_and_what_is_left_in_the_end(demo) -> None:
    result = await soak(Endpoint.from_url(demo.url), "", demo.process.pid, disconnects=20, requests=100)
    *_, tiny = result.phases
    assert set(tiny.outcomes) == {"200", "left"}
    assert tiny.outcomes["200"] + tiny.outcomes["left"] == 100
    assert result.metrics["kv_blocks_free"] == result.metrics["kv_blocks"]
    assert set(result.after.held) == {"supervisor", "engine", "api worker 0"}


@contextlib.contextmanager
def slow_client(server: Server, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A connection on which a stream has been asked for, and of whose answer little fits into the network."""
    url, content = httpx.URL(server.url), json.dumps(body | {"stream": True}).encode()
    with socket.socket() as connection:
        connection.settimeout(60)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        # The server's kernel makes room for some segments; of loopback's own, of 64 KiB, that would be megabytes.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        connection.connect((url.host, url.port))
        head = b"POST /v1/completions HTTP/1.1\r\nHost: server\r\nConnection: close\r\n"
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        yield connection


class Received:
    """What has been read of a connection, as one that can be read again."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def makefile(self, _: str) -> io.BytesIO:
        return io.BytesIO(self._content)


def events(received: bytes) -> list[str]:
    """The data of the events of a whole answer."""
    response = http.client.HTTPResponse(Received(received))  # type: ignore[arg-type]
    response.begin()
    return [line.removeprefix("data: ") for line in response.read().decode().split("\n\n") if line]


def answered(server: Server) -> float:
    """Completions that have been sent to their end, or given up."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    counts = re.findall(r'^persimmon_http_requests_total\{endpoint="/v1/completions",\S+ (\S+)$', text, re.MULTILINE)
    return sum(map(float, counts))


def choices(answers: list[dict[str, Any]]) -> dict[int, tuple[str, list[str]]]:
    """Text and tokens of each choice, from a whole answer or all events of a stream."""
    found: dict[int, tuple[str, list[str]]] = {}
    for choice in (own for answer in answers for own in answer["choices"]):
        text, tokens = found.get(choice["index"], ("", []))
        reported = choice["logprobs"]["tokens"] if choice["logprobs"] else []
        found[choice["index"]] = (text + choice["text"], tokens + reported)
    return found


def test_a_client_that_reads_a_byte_at_a_time_costs_little_and_its_neighbours_nothing(demo) -> None:
    with httpx.Client(base_url=demo.url, timeout=60) as client, contextlib.ExitStack() as stack:

        def neighbour() -> str:
            return str(client.post("/v1/completions", json=NEIGHBOUR | {"max_tokens": 10}).json()["choices"][0]["text"])

        quiet = neighbour()
        expected = choices([client.post("/v1/completions", json=LARGE).json()])
        demo.wait_until_idle()
        worker = psutil.Process(demo.children()["api"])
        before, memory, descriptors = answered(demo), worker.memory_info().rss, worker.num_fds()
        stays, leaves = (stack.enter_context(slow_client(demo, LARGE)) for _ in range(2))
        received = b""
        for _ in range(BYTES_READ):
            assert neighbour() == quiet
            received += stays.recv(1)
            leaves.recv(1)
        demo.wait_until_idle()  # the engine has nothing to do with it any more, and nothing of it
        assert answered(demo) == before + BYTES_READ
        assert worker.memory_info().rss - memory < MAX_WORKER_BYTES
        leaves.close()
        while data := stays.recv(2**16):
            received += data
        *answers, last = events(received)
        assert last == "[DONE]"
        assert choices([json.loads(answer) for answer in answers]) == expected
        stays.close()
        while answered(demo) < before + BYTES_READ + 2 or worker.num_fds() > descriptors:
            pass  # a request a turn
