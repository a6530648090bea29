"""How many times an answer is written: to a transport that keeps what it is given."""

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from persimmon.server.http.transport.connection import Connection
from persimmon.server.http.transport.exchange import Exchange
from persimmon.server.http.transport.request_reader import RequestReader

pytestmark = pytest.mark.anyio

HEAD = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]}
BODY = {"type": "http.response.body", "body": b"body"}
REQUEST = b"GET / HTTP/1.1\r\nHost: server\r\n\r\n"
SENT_HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n"

App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Transport:
    """Keeps each write."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.writes.append(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str) -> None:
        """Nothing is known."""

    def pause_reading(self) -> None:
        """Nothing is read."""

    def resume_reading(self) -> None:
        """Nothing is read."""


async def whole(scope: Scope, receive: Receive, send: Send) -> None:
    await send(HEAD)
    await send(BODY)


async def answered(app: App, request: bytes) -> Transport:
    """What was written when all tasks have ended."""
    state, transport = ServerState(), Transport()
    connection = Connection(app, state, {}, header_seconds=60, send_seconds=60, keep_alive_seconds=60)
    connection.connection_made(transport)  # type: ignore[arg-type]
    connection.data_received(request)
    async with asyncio.timeout(20):
        while state.tasks:
            await asyncio.wait(set(state.tasks))
            await asyncio.sleep(0)
    connection.connection_lost(None)
    return transport


async def test_a_whole_answer_is_written_once() -> None:
    assert (await answered(whole, REQUEST)).writes == [SENT_HEAD + b"body"]


async def test_nothing_of_a_request_is_left_for_the_garbage_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        before = living_requests()
        for _ in range(3):
            await answered(whole, REQUEST * 4)
        assert living_requests() == before
    finally:
        gc.enable()


def living_requests() -> int:
    return sum(isinstance(own, Exchange | RequestReader | Connection) for own in gc.get_objects())


async def test_answers_to_pipelined_requests_are_written_once_each_in_their_order() -> None:
    assert (await answered(whole, REQUEST * 3)).writes == [SENT_HEAD + b"body"] * 3


async def test_the_head_does_not_wait_for_a_body_that_comes_later() -> None:
    writes: list[list[bytes]] = []

    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        await send(HEAD)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        writes.append(list(transport_of(send).writes))
        for part in (b"bo", b"dy"):
            await send({"type": "http.response.body", "body": part, "more_body": part == b"bo"})

    def transport_of(send: Any) -> Transport:
        found: Transport = send.__self__._wire._transport
        return found

    assert (await answered(late, REQUEST)).writes == [SENT_HEAD, b"bo", b"dy"]
    assert writes == [[SENT_HEAD]]


async def test_a_head_without_a_body_is_written_before_the_next_answer() -> None:
    asked = REQUEST.replace(b"GET", b"HEAD") + REQUEST
    assert (await answered(whole, asked)).writes == [SENT_HEAD, SENT_HEAD + b"body"]


async def test_an_answer_is_written_before_its_connection_is_closed() -> None:
    for method in (b"GET", b"HEAD"):
        request = REQUEST.replace(b"GET", method).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        transport = await answered(whole, request)
        assert transport.closed
        assert b"".join(transport.writes).endswith(b"\r\n\r\nbody" if method == b"GET" else b"\r\n\r\n")


async def test_a_client_is_told_to_go_on_before_it_has_an_answer() -> None:
    async def reading(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await whole(scope, receive, send)

    request = b"POST / HTTP/1.1\r\nHost: server\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n1"
    assert (await answered(reading, request)).writes == [b"HTTP/1.1 100 Continue\r\n\r\n", SENT_HEAD + b"body"]
