"""Clients that go away: raw connections, closed at a chosen moment."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from persimmon.server.engine.client import EngineClient
from persimmon.server.http.transport.disconnect import until_disconnect
from tests.server.http.conftest import LiveServer
from tests.server.http.fake_engine import FakeEngine, silent

pytestmark = pytest.mark.anyio

Tokens = Callable[[str], list[int]]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@contextlib.asynccontextmanager
async def request(server: LiveServer, path: str, **body: object) -> AsyncIterator[asyncio.StreamReader]:
    """A request whose client leaves at the end of the block."""
    asked = {"prompt": "Hello"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "Hi"}]}
    content = json.dumps({**asked, **body}).encode()
    reader, writer = await asyncio.open_connection(server.host, server.port)
    head = f"POST {path} HTTP/1.1\r\nHost: server\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    await writer.drain()
    try:
        yield reader
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_client_that_leaves_before_the_first_token_has_its_sequences_aborted(
    server: LiveServer, engine: FakeEngine, engine_client: EngineClient, path: str, stream: bool
) -> None:
    async with request(server, path, stream=stream, n=3):
        submits = await engine.submissions(3)
    assert sorted(await engine.aborts(3)) == [submit.sequence_id for submit in submits]
    assert engine_client.open_streams == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_in_the_middle_has_its_sequence_aborted(
    server: LiveServer, engine: FakeEngine, tokens: Tokens, stream: bool
) -> None:
    async with request(server, COMPLETIONS, stream=stream, max_tokens=100) as reader:
        [submit] = await engine.submissions(1)
        await engine.send(submit.sequence_id, tokens("yes"))
        if stream:
            await reader.readuntil(b" yes")
    assert await engine.aborts(1) == [submit.sequence_id]


async def test_one_clients_leaving_leaves_the_others_alone(
    server: LiveServer, engine: FakeEngine, tokens: Tokens
) -> None:
    async with httpx.AsyncClient(base_url=server.url) as client:
        stays = asyncio.create_task(client.post(COMPLETIONS, json={"prompt": "Hello"}))
        [first] = await engine.submissions(1)
        async with request(server, COMPLETIONS):
            await engine.submissions(2)
        assert await engine.aborts(1) == [engine.submitted[1].sequence_id]
        await engine.send(first.sequence_id, tokens("still here"), "length")
        assert (await stays).json()["choices"][0]["text"] == " still here"
    assert len(engine.aborted) == 1


async def test_a_client_that_reads_to_the_end_causes_no_abort(
    server: LiveServer, engine: FakeEngine, tokens: Tokens
) -> None:
    async with httpx.AsyncClient(base_url=server.url) as client:
        for count, stream in enumerate((False, True), 1):
            asking = asyncio.create_task(client.post(COMPLETIONS, json={"prompt": "Hello", "stream": stream}))
            await engine.submissions(count)
            await engine.send(engine.submitted[-1].sequence_id, tokens("yes"), "length")
            assert (await asking).status_code == 200
    async with request(server, COMPLETIONS):  # its abort is the only one: messages arrive in order
        await engine.submissions(3)
    assert await engine.aborts(1) == [engine.submitted[2].sequence_id]


async def test_a_crowd_that_leaves_at_once_leaves_nothing_open(
    server: LiveServer, engine: FakeEngine, engine_client: EngineClient
) -> None:
    engine.script = silent
    async with contextlib.AsyncExitStack() as crowd:
        for index in range(60):
            path = COMPLETIONS if index % 3 else CHAT
            await crowd.enter_async_context(request(server, path, stream=bool(index % 2)))
        await engine.submissions(60)
    assert sorted(await engine.aborts(60)) == sorted(submit.sequence_id for submit in engine.submitted)
    assert engine_client.open_streams == 0


async def test_a_client_that_left_is_counted_as_such(server: LiveServer, engine: FakeEngine) -> None:
    async with httpx.AsyncClient(base_url=server.url) as client:
        for count, stream in enumerate((False, True), 1):
            async with request(server, COMPLETIONS, stream=stream):
                await engine.submissions(count)
        counted = 'persimmon_http_requests_total{endpoint="/v1/completions",status="499"} 2.0'
        async with asyncio.timeout(20):
            while counted not in (await client.get("/metrics")).text:
                pass


async def never_receives() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def has_left() -> Message:
    return {"type": "http.disconnect"}


async def test_work_ends_before_its_clients_leaving_is_told() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.set()

    with pytest.raises(ClientDisconnect):
        await until_disconnect(has_left, work())
    assert ended.is_set()


async def test_work_gives_its_result_or_its_error_and_leaves_no_task() -> None:
    async def result() -> int:
        return 5

    async def error() -> int:
        raise ZeroDivisionError

    before = asyncio.all_tasks()
    assert await until_disconnect(never_receives, result()) == 5
    with pytest.raises(ZeroDivisionError):
        await until_disconnect(never_receives, error())
    assert asyncio.all_tasks() == before


async def test_cancelling_the_request_cancels_its_work() -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    task = asyncio.create_task(until_disconnect(never_receives, work()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
