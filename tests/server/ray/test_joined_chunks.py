"""Parts of an answer that follow each other closely reach a proxy as one."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from persimmon.server.ray.joined_chunks import JoinedChunks

pytestmark = pytest.mark.anyio

START: Message = {"type": "http.response.start", "status": 200, "headers": []}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def body(content: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}


def answering(messages: Sequence[Message], pause: Callable[[int], Awaitable[None]] | None = None) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for index, message in enumerate(messages):
            if pause is not None:
                await pause(index)
            await send(message)

    return app


async def received(app: ASGIApp, scope: Scope | None = None) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("nothing is read")

    await app(scope or {"type": "http"}, receive, send)
    return sent


async def test_the_first_part_comes_at_once_and_what_follows_closely_in_one():
    parts = [body(b"%d" % number) for number in range(10)]
    sent = await received(JoinedChunks(answering([START, *parts, body(b"", more=False)]), 60))
    assert sent == [START, body(b"0"), body(b"123456789", more=False)]


async def test_a_part_that_nothing_follows_is_sent_after_the_interval():
    sent: list[Message] = []
    arrived = asyncio.Event()

    async def send(message: Message) -> None:
        sent.append(message)
        if message.get("body") == b"bc":
            arrived.set()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in (START, body(b"a"), body(b"b"), body(b"c")):
            await send(message)
        await arrived.wait()
        await send(body(b"d", more=False))

    receive: Any = None
    await JoinedChunks(app, 0.001)({"type": "http"}, receive, send)
    assert sent[:3] == [START, body(b"a"), body(b"bc")]
    assert b"".join(message.get("body", b"") for message in sent) == b"abcd"
    assert sent[-1]["more_body"] is False


async def test_nothing_is_joined_without_an_interval():
    messages = [START, body(b"a"), body(b"b"), body(b"", more=False)]
    assert await received(JoinedChunks(answering(messages), 0)) == messages


async def test_an_answer_in_one_piece_is_not_delayed():
    messages = [START, body(b"all", more=False)]
    assert await received(JoinedChunks(answering(messages), 60)) == messages


async def test_other_protocols_pass():
    messages = [{"type": "lifespan.startup.complete"}]
    assert await received(JoinedChunks(answering(messages), 60), {"type": "lifespan"}) == messages


async def test_nothing_is_sent_after_the_application_has_failed():
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in (START, body(b"a"), body(b"b")):
            await send(message)
        raise RuntimeError

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    receive: Any = None
    with pytest.raises(RuntimeError):
        await JoinedChunks(app, 0.001)({"type": "http"}, receive, send)
    later = asyncio.Event()  # than the part would have been sent
    asyncio.get_running_loop().call_later(0.002, later.set)
    await later.wait()
    assert sent == [START, body(b"a")]


async def test_a_slow_client_gets_the_parts_in_order():
    """A part that is being sent when the next one is due is not overtaken."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            for _ in range(50):
                await asyncio.sleep(0)
        sent.append(message)

    async def turns(index: int) -> None:
        for _ in range(index % 4 * 10):
            await asyncio.sleep(0)

    parts = [body(b"%d" % number) for number in range(10)]
    receive: Any = None
    await JoinedChunks(answering([START, *parts, body(b"", more=False)], turns), 1e-6)({"type": "http"}, receive, send)
    assert b"".join(message.get("body", b"") for message in sent) == b"0123456789"
