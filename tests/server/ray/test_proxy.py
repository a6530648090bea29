"""What Ray's proxies do for the server: the header with a prompt's beginnings, and the end of broken answers."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from persimmon.server.ray.prefixes import prefix_keys
from persimmon.server.ray.proxy import (
    MAX_READ_BYTES,
    SESSION_HEADER,
    PrefixHeader,
    WholeAnswers,
    middlewares,
    session_id,
)

pytestmark = pytest.mark.anyio

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def scope(path: str = CHAT, method: str = "POST", headers: Sequence[tuple[bytes, bytes]] = ()) -> Scope:
    return {"type": "http", "method": method, "path": path, "headers": list(headers)}


def conversation(*texts: str, **fields: Any) -> bytes:
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return json.dumps({"model": "m", **fields, "messages": messages}).encode()


def requests(*parts: bytes) -> list[Message]:
    last = len(parts) - 1
    return [{"type": "http.request", "body": part, "more_body": index < last} for index, part in enumerate(parts)]


async def passed_on(middleware: Callable[[ASGIApp], ASGIApp], scope: Scope, messages: list[Message]) -> Any:
    """The headers and messages that the application behind a middleware gets."""
    waiting = list(messages)
    got: list[Any] = []

    async def receive() -> Message:
        return waiting.pop(0)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        got.append(dict(scope["headers"]))
        got.extend([await receive() for _ in messages])

    async def send(message: Message) -> None:
        raise AssertionError("nothing is answered")

    await middleware(app)(scope, receive, send)
    headers, *others = got
    return headers, others


LONG = "Tell me about persimmons. " * 20
TURN = conversation(LONG)
NEXT = conversation(LONG, "They are fruit.", "Which?")


def test_a_turn_has_the_keys_of_the_turn_before_and_more():
    before, after = session_id(CHAT, TURN).split(","), session_id(CHAT, NEXT).split(",")
    assert len(before) > 5
    assert after[: len(before)] == before


@pytest.mark.parametrize(
    "other",
    [
        (TEXT, TURN),
        (CHAT, conversation(LONG, cache_salt="mine")),
        (CHAT, conversation(LONG, tools=[{"type": "function"}])),
        (CHAT, conversation("Other." + LONG)),
    ],
    ids=["another endpoint", "a salt", "tools", "another text"],
)
def test_prompts_that_share_no_cache_share_no_key(other: tuple[str, bytes]):
    assert not set(session_id(CHAT, TURN).split(",")) & set(session_id(*other).split(","))


def test_fields_that_change_no_prompt_change_no_key():
    assert session_id(CHAT, conversation(LONG, temperature=0.5, stream=True)) == session_id(CHAT, TURN)


@pytest.mark.parametrize("prompt", [LONG, [5] * 100, [LONG, LONG]], ids=["text", "token ids", "several"])
def test_completions_have_keys_too(prompt: Any):
    body = json.dumps({"prompt": prompt}).encode()
    assert session_id(TEXT, body).split(",") == prefix_keys(json.dumps(prompt).encode(), TEXT.encode() + b"\0\0")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"prompt": "short"}', b"[" * 10_000, b'{"messages": 1}'])
def test_a_body_that_tells_nothing_has_no_keys(body: bytes):
    assert session_id(CHAT, body) == ""


async def test_a_body_is_read_before_the_proxy_chooses_and_passed_on_as_it_came():
    messages = requests(TURN[:100], TURN[100:])
    headers, got = await passed_on(PrefixHeader, scope("/prefix" + CHAT), messages)
    assert headers == {SESSION_HEADER.encode(): session_id(CHAT, TURN).encode()}
    assert got == messages


@pytest.mark.parametrize(
    "passing",
    [
        scope("/v1/embeddings"),
        scope(method="GET"),
        scope(headers=[(SESSION_HEADER.encode(), b"mine")]),
        {"type": "websocket", "path": CHAT, "headers": []},
    ],
    ids=["another endpoint", "another method", "a session of the client's", "a websocket"],
)
async def test_other_requests_pass_untouched(passing: Scope):
    messages = requests(TURN)
    assert await passed_on(PrefixHeader, passing, messages) == (dict(passing["headers"]), messages)


async def test_a_long_body_is_not_waited_for():
    more: Message = {"type": "http.request", "body": b" " * MAX_READ_BYTES, "more_body": True}
    messages = [more, more, *requests(TURN)]
    assert await passed_on(PrefixHeader, scope(), messages) == ({}, messages)


async def test_a_client_that_leaves_while_it_sends_is_noticed_behind_the_middleware():
    messages: list[Message] = [*requests(TURN[:100], TURN)[:1], {"type": "http.disconnect"}]
    assert await passed_on(PrefixHeader, scope(), messages) == ({}, messages)


def start(status: int = 200, headers: Sequence[tuple[bytes, bytes]] = STREAM) -> Message:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body(content: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}


async def answered(messages: Sequence[Message], client: Message | None = None) -> list[Message]:
    """What a client gets where Ray's proxy sends some messages and returns."""
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if client is not None:
            await receive()
        for message in messages:
            await send(message)

    async def receive() -> Message:
        assert client is not None
        return client

    async def send(message: Message) -> None:
        sent.append(message)

    await WholeAnswers(app)(scope(), receive, send)
    return sent


async def test_a_broken_stream_ends_with_an_error_event():
    *passed, last = await answered([start(), body(b"data: 1\n\n")])
    assert passed == [start(), body(b"data: 1\n\n")]
    assert last["more_body"] is False
    error = json.loads(last["body"].removeprefix(b"data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "replica_dead")
    assert "send the request again" in error["message"]


async def test_an_answer_that_never_began_is_a_503_to_be_sent_again():
    first, last = await answered([])
    assert first["status"] == 503
    assert (b"retry-after", b"5") in first["headers"]
    assert json.loads(last["body"])["error"]["code"] == "replica_dead"


@pytest.mark.parametrize(
    "messages",
    [
        [start(), body(b"data: [DONE]\n\n"), body(b"", more=False)],
        [start(429, [(b"content-type", b"text/plain")]), body(b"full", more=False)],
        [start(200, [(b"content-type", b"application/json")]), body(b'{"half')],
    ],
    ids=["a whole stream", "a whole answer", "half of a body that is no stream"],
)
async def test_other_answers_stay_as_they_are(messages: list[Message]):
    assert await answered(messages) == messages


async def test_a_client_that_has_left_gets_nothing_more():
    messages = [start(), body(b"data: 1\n\n")]
    assert await answered(messages, client={"type": "http.disconnect"}) == messages
    assert await answered([], client={"type": "http.disconnect"}) == []


async def test_ray_gets_both():
    classes: list[Any] = [each.cls for each in middlewares()]
    assert classes == [WholeAnswers, PrefixHeader]
