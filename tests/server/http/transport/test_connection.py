"""Connections over raw sockets: what is answered in which order, who is waited for and for how long."""

import asyncio
import contextlib
import re
import socket
import struct
from collections.abc import AsyncIterator

import pytest
from fastapi import FastAPI, Request
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from persimmon.server.http import errors
from persimmon.server.http.transport.body import BodyReader
from persimmon.server.http.transport.disconnect import until_disconnect
from tests.server.http.raw import PATIENT, RawClient, connected, listening

pytestmark = pytest.mark.anyio

HOST = b"Host: server\r\n"
REQUEST = b"POST /length HTTP/1.1\r\n" + HOST
LATER = b"POST /later HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\n\r\nab"
STREAM = LATER.replace(b"/later", b"/stream")
OK = b"HTTP/1.1 200 OK"


class App:
    """Answers lengths of bodies at once, and others when the test releases them.

    Attributes:
        api: the application.
        asked: counts requests for later answers and streams that have begun.
        more: one for each answer, or each part of a stream, that may be sent.
        left: counts clients that left before their answer.
    """

    def __init__(self, body_seconds: float) -> None:
        self.asked = asyncio.Semaphore(0)
        self.more = asyncio.Semaphore(0)
        self.left = asyncio.Semaphore(0)
        self.api = FastAPI(redirect_slashes=False)
        errors.install(self.api)
        bodies = BodyReader(1000, body_seconds)

        @self.api.post("/length")
        async def length(request: Request) -> int:
            return len(await bodies.read(request, bytes))

        @self.api.post("/later")
        async def later(request: Request) -> Response:
            body = await bodies.read(request, bytes)
            return await self.counted(request.receive, PlainTextResponse(body))

        @self.api.post("/stream")
        async def stream(request: Request) -> Response:
            await bodies.read(request, bytes)
            return StreamingResponse(self.parts())

    async def counted(self, receive: Receive, response: Response) -> Response:
        self.asked.release()
        try:
            await until_disconnect(receive, self.more.acquire())
        except ClientDisconnect:
            self.left.release()
            raise
        return response

    async def parts(self) -> AsyncIterator[bytes]:
        self.asked.release()
        try:
            for part in (b"one", b"two", b"three"):
                await self.more.acquire()
                yield part
        except (asyncio.CancelledError, GeneratorExit):
            self.left.release()
            raise

    def go_on(self, times: int) -> None:
        """Releases a number of answers or parts."""
        for _ in range(times):
            self.more.release()


@contextlib.asynccontextmanager
async def serving(
    header_seconds: float = PATIENT, body_seconds: float = PATIENT
) -> AsyncIterator[tuple[App, tuple[str, int]]]:
    app = App(body_seconds)
    async with listening(app.api, header_seconds) as address:
        yield app, address


@contextlib.asynccontextmanager
async def connection(header_seconds: float = PATIENT, body_seconds: float = PATIENT) -> AsyncIterator[RawClient]:
    async with serving(header_seconds, body_seconds) as (_, address), connected(*address) as client:
        yield client


@contextlib.asynccontextmanager
async def asked(sent: bytes, header_seconds: float = PATIENT) -> AsyncIterator[tuple[App, RawClient]]:
    """A client whose request has reached the application, which has not answered."""
    async with serving(header_seconds) as (app, address), connected(*address) as client:
        await client.send(sent)
        await app.asked.acquire()
        yield app, client


async def test_requests_one_after_the_other_and_in_pieces_are_answered() -> None:
    async with connection() as client:
        for size in (0, 1, 1000):
            request = REQUEST + b"Content-Length: %d\r\n\r\n" % size + b"a" * size
            for begin in range(0, len(request), 7):
                await client.send(request[begin : begin + 7])
            answer = await client.answer()
            assert (answer.status, int(answer.body)) == (200, size)


async def test_pipelined_requests_are_answered_in_their_order() -> None:
    async with connection() as client:
        await client.send(b"".join(REQUEST + b"Content-Length: %d\r\n\r\n" % size + b"a" * size for size in range(30)))
        assert [int((await client.answer()).body) for _ in range(30)] == list(range(30))


async def test_an_upgrade_offer_is_declined_and_the_request_answered() -> None:
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA\r\n"
    async with connection() as client:
        for _ in range(2):
            await client.send(REQUEST + offer + b"Content-Length: 3\r\n\r\n")
            await client.send(b"abc")
            answer = await client.answer()
            assert (answer.status, answer.body) == (200, b"3")
            assert "upgrade" not in answer.headers


async def test_a_body_is_asked_for_where_the_client_waits_for_that() -> None:
    async with connection() as client:
        await client.send(REQUEST + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n")
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(b"abc")
        assert (await client.answer()).body == b"3"
        # Not where the answer is known without it.
        await client.send(REQUEST + b"Expect: 100-continue\r\nContent-Length: 3000\r\n\r\n")
        assert (await client.answer()).status == 413


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\r\n",
        b"POST /len",
        REQUEST,
        REQUEST + b"X-Slow: a",
        REQUEST + b"Content-Length: 0\r\n\r\nP",
    ],
)
async def test_a_client_that_does_not_finish_its_headers_is_hung_up_on(sent: bytes) -> None:
    async with connection(header_seconds=0.2) as client:
        await client.send(sent)
        await client.end()


async def test_headers_that_trickle_do_not_put_the_deadline_off() -> None:
    async with connection(header_seconds=0.2) as client:
        await client.send(REQUEST)
        ended = asyncio.create_task(client.end())
        while not ended.done():
            await client.send(b"X-Slow: a\r\n")
            await asyncio.wait((ended,), timeout=0.05)


async def test_a_body_that_stands_still_is_a_408() -> None:
    async with connection(body_seconds=0.2) as client:
        await client.send(REQUEST + b"Content-Length: 100\r\n\r\nabc")
        answer = await client.answer()
        assert answer.status == 408
        assert re.search(r"3 bytes in \d+ s", answer.error["message"])
        await client.end()


async def test_what_is_no_http_is_a_400_in_the_shape_of_other_errors() -> None:
    async with connection() as client:
        await client.send(b"\x16\x03\x01\x02\x00\x01")  # a client that speaks TLS
        answer = await client.answer()
        assert (answer.status, answer.error["code"]) == (400, "invalid_http")
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["connection"] == "close"
        assert len(answer.headers["x-request-id"]) == 32
        assert await client.end() == b""


async def test_who_sends_an_endless_head_reads_why_it_is_refused() -> None:
    async with connection() as client:
        await client.send(b"GET /" + b"a" * 2**20)
        assert (await client.answer()).status == 414
        await client.end()


async def test_a_body_whose_chunks_are_wrong_is_a_400_of_the_application() -> None:
    async with connection() as client:
        await client.send(REQUEST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await client.send(b"zz\r\nabc\r\n" + REQUEST)
        answer = await client.answer()
        assert (answer.status, answer.error["code"], answer.headers["connection"]) == (400, "invalid_http", "close")
        assert await client.end() == b""


async def test_who_sends_too_long_a_body_reads_why_and_cannot_go_on_for_ever() -> None:
    async with connection(header_seconds=0.5) as client:
        await client.send(REQUEST + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"1000\r\n" + b"a" * 4096 + b"\r\n"
        await client.send(chunk)
        assert (await client.answer()).status == 413
        ended = asyncio.create_task(client.end())
        while not ended.done():
            await client.send(chunk)
            await asyncio.wait((ended,), timeout=0.02)


async def test_a_refused_body_that_comes_to_its_end_leaves_the_connection_open() -> None:
    async with connection() as client:
        await client.send(REQUEST + b"Content-Length: 200000\r\n\r\n")
        assert (await client.answer()).status == 413
        await client.send(b"a" * 200_000 + REQUEST + b"Content-Length: 1\r\n\r\na")
        assert (await client.answer()).body == b"1"


BEHIND = {
    "line end": b"\r\n",
    "line ends": b"\r\n\r\n",
    "first byte of a request": b"P",
    "half of a head": REQUEST,
    "garbage": b"\x00\x01 garbage \r\n\r\n",
    "a request without a Host": b"GET / HTTP/1.1\r\n\r\n",
    "an endless address": b"GET /" + b"a" * 100_000,
}


@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND)
@pytest.mark.parametrize("request_", [LATER, STREAM], ids=["later", "stream"])
@pytest.mark.parametrize("apart", [False, True])
async def test_what_comes_behind_a_body_does_not_touch_its_answer(request_: bytes, behind: bytes, apart: bool) -> None:
    async with asked(request_ if apart else request_ + behind, header_seconds=0.05) as (app, client):
        if apart:
            await client.send(behind)
        # Longer than headers may take.
        other = await asyncio.open_connection(*client.writer.get_extra_info("peername"))
        assert await other[0].read() == b""
        other[1].close()
        app.go_on(3)
        answer = await client.answer()
        assert (answer.status, answer.body) == (200, b"ab" if request_ is LATER else b"onetwothree")
        if not behind.strip():
            await client.send(REQUEST + b"Content-Length: 1\r\n\r\na")
            assert (await client.answer()).body == b"1"
            return
        # What is not a request is refused after it, in its turn, and one that does not come ends the connection.
        rest = await client.end()
        assert bool(re.match(rb"HTTP/1.1 4\d\d ", rest)) == (behind[:1] != b"P")


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("request_", [LATER, STREAM], ids=["later", "stream"])
async def test_a_client_that_half_closes_is_answered(request_: bytes, version: bytes) -> None:
    async with asked(request_.replace(b"/1.1", b"/" + version)) as (app, client):
        client.writer.write_eof()
        app.go_on(3)
        answer = await client.answer()
        assert (answer.status, answer.body) == (200, b"ab" if request_ is LATER else b"onetwothree")
        assert await client.end() == b""


async def test_a_client_that_half_closes_with_its_request_is_answered_and_all_that_it_asked_before() -> None:
    async with connection() as client:
        await client.send((REQUEST + b"Content-Length: 2\r\n\r\nab") * 3)
        client.writer.write_eof()
        assert [(await client.answer()).body for _ in range(3)] == [b"2"] * 3
        assert await client.end() == b""


@pytest.mark.parametrize("sent", [REQUEST, REQUEST + b"Content-Length: 9\r\n\r\nabc", b""])
async def test_a_client_that_half_closes_within_a_request_is_hung_up_on(sent: bytes) -> None:
    async with connection() as client:
        await client.send(sent)
        client.writer.write_eof()
        assert await client.end() == b""


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("how", ["close", "reset", "half-close, then close"])
async def test_a_client_that_is_gone_is_noticed_before_its_answer_begins(version: bytes, how: str) -> None:
    async with asked(LATER.replace(b"/1.1", b"/" + version)) as (app, client):
        if how == "reset":
            client.writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
        if how.startswith("half"):
            client.writer.write_eof()
            assert await client.reader.readexactly(1) == b"H"
        client.writer.close()
        await app.left.acquire()


async def test_a_client_that_is_gone_is_noticed_between_two_parts_of_its_stream() -> None:
    async with asked(STREAM) as (app, client):
        app.go_on(1)
        await client.reader.readuntil(b"one\r\n")
        client.writer.close()
        await app.left.acquire()


async def test_a_client_that_is_gone_is_noticed_with_the_next_part_of_a_stream_without_chunks() -> None:
    async with asked(STREAM.replace(b"/1.1", b"/1.0")) as (app, client):
        app.go_on(1)
        await client.reader.readuntil(b"one")
        client.writer.close()
        app.go_on(1)
        await app.left.acquire()


async def test_a_half_closed_client_gets_a_stream_that_others_can_read() -> None:
    async with asked(STREAM) as (app, client):
        app.go_on(1)
        assert (await client.reader.readuntil(b"one\r\n")).endswith(b"\r\n3\r\none\r\n")
        client.writer.write_eof()
        assert await client.reader.readexactly(2) == b"00"  # they look for the client
        app.go_on(2)
        assert re.fullmatch(rb"0*3\r\ntwo\r\n0*5\r\nthree\r\n0+\r\n\r\n", await client.end())


async def test_a_client_that_is_gone_is_noticed_while_its_other_requests_wait() -> None:
    async with asked(LATER * 3) as (app, client):
        client.writer.close()
        await app.left.acquire()
        app.go_on(3)
        assert app.asked.locked()  # the others are not begun


async def test_http_1_0_gets_a_stream_without_chunks_and_the_end_of_the_connection() -> None:
    async with asked(STREAM.replace(b"/1.1\r\n", b"/1.0\r\nConnection: keep-alive\r\n")) as (app, client):
        app.go_on(3)
        answer = await client.answer()
        assert (answer.status, answer.body) == (200, b"onetwothree")
        assert "transfer-encoding" not in answer.headers
        assert answer.headers["connection"] == "close"


@pytest.mark.parametrize("keeps", [False, True])
async def test_http_1_0_keeps_its_connection_where_it_asks_for_that(keeps: bool) -> None:
    request = b"POST /length HTTP/1.0\r\nContent-Length: 2\r\n" + b"Connection: keep-alive\r\n" * keeps + b"\r\nab"
    async with connection() as client:
        for _ in range(2 if keeps else 1):
            await client.send(request)
            answer = await client.answer()
            assert (answer.body, answer.headers["connection"]) == (b"2", "keep-alive" if keeps else "close")
        if not keeps:
            assert await client.end() == b""


async def test_nothing_is_read_after_a_request_that_closes_the_connection() -> None:
    last = REQUEST + b"Connection: close\r\nContent-Length: 2\r\n\r\nab"
    async with connection() as client:
        await client.send(last + last)
        assert (await client.answer()).headers["connection"] == "close"
        assert await client.end() == b""


async def test_a_client_that_does_not_read_is_given_up() -> None:
    given_up = asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        async def write() -> None:
            await send({"type": "http.response.start", "status": 200})
            while True:
                await send({"type": "http.response.body", "body": b"a" * 65536, "more_body": True})

        await receive()
        with pytest.raises(ClientDisconnect):
            await until_disconnect(receive, write())
        given_up.set()

    async with listening(endless, send_seconds=0.1) as address, connected(*address, limit=1) as client:
        await client.send(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
        await given_up.wait()


async def test_an_answer_that_breaks_off_is_not_taken_for_whole() -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        raise ZeroDivisionError

    async with listening(failing) as address, connected(*address) as client:
        await client.send(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
        received = await client.end()
        assert received.startswith(OK)
        assert received.endswith(b"3\r\none\r\n")  # without the last chunk
