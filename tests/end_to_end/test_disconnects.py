"""Clients that leave at any moment: nothing of them stays, and their neighbours do not notice."""

import asyncio
import contextlib
import json
import random

import httpx
import psutil
import pytest

from benchmarks.soak import soak
from server.bench.http_client import Endpoint

pytestmark = pytest.mark.anyio

LEAVERS = 300
AT_ONCE = 50  # more than run at once, so that some leave the queue
NEIGHBOUR = {"prompt": "human: What does galaxy mean?\n\nadept:", "max_tokens": 40, "temperature": 0.9, "seed": 3}


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
    assert result.metrics["kv_blocks_free"] == result.metrics["kv_blocks_total"]
    assert set(result.after.held) == {"supervisor", "engine", "api worker 0"}
