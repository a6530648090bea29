"""What comes before and in a body, over raw sockets."""

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial

import pytest
import uvicorn
from fastapi import FastAPI, Request

from server.http import errors
from server.http.body import BodyReader
from server.http.bounded_protocol import MOST_HEADER_BYTES, MOST_HEADERS, BoundedProtocol
from tests.server.http.conftest import _Uvicorn

pytestmark = pytest.mark.anyio

PATIENT = 600.0
REQUEST = b"POST /length HTTP/1.1\r\nHost: server\r\n"


@dataclass(frozen=True)
class Connection:
    """A client that writes bytes as it likes."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The next answer: status, headers, body."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        status, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return int(status.split()[1]), headers, await self.reader.readexactly(int(headers["content-length"]))

    async def end(self) -> None:
        """Returns when the server has hung up."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass


@contextlib.asynccontextmanager
async def connection(header_seconds: float = PATIENT, body_seconds: float = PATIENT) -> AsyncIterator[Connection]:
    app = FastAPI()
    errors.install(app)
    bodies = BodyReader(1000, body_seconds)

    @app.post("/length")
    async def length(request: Request) -> int:
        return len(await bodies.read(request))

    protocol = partial(BoundedProtocol, header_seconds=header_seconds)
    config = uvicorn.Config(app, http=protocol, ws="none", lifespan="off", log_config=None)  # type: ignore[arg-type]
    listener = socket.create_server(("127.0.0.1", 0))
    running = _Uvicorn(config)
    serving = asyncio.create_task(running.serve(sockets=[listener]))
    async with asyncio.timeout(60):
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        try:
            yield Connection(reader, writer)
        finally:
            writer.close()
            running.should_exit = running.force_exit = True
            await serving


async def test_requests_one_after_the_other_and_in_pieces_are_answered() -> None:
    async with connection() as client:
        for size in (0, 1, 1000):
            request = REQUEST + b"Content-Length: %d\r\n\r\n" % size + b"a" * size
            for begin in range(0, len(request), 7):
                await client.send(request[begin : begin + 7])
            status, _, body = await client.answer()
            assert (status, int(body)) == (200, size)
        # Pipelined.
        await client.send((REQUEST + b"Content-Length: 2\r\n\r\nab") * 3)
        assert [(await client.answer())[2] for _ in range(3)] == [b"2"] * 3


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\r\n",
        b"POST /len",
        REQUEST,
        REQUEST + b"X-Slow: a",
        b"POST /length HTTP/1.1\r\nContent-Length: 0\r\n\r\nP",
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
        status, _, body = await client.answer()
        assert status == 408
        assert re.search(r"3 bytes in \d+ s", json.loads(body)["error"]["message"])
        await client.end()


LONG = b"a" * (MOST_HEADER_BYTES + 1)
ENDLESS = LONG * 10  # more than one read


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /" + LONG + b" HTTP/1.1\r\n\r\n",
        b"POST /" + ENDLESS,
        REQUEST + b"X-Long: " + LONG + b"\r\n\r\n",
        REQUEST + b"X-Long: " + ENDLESS,
        REQUEST + ENDLESS,
        REQUEST + b"".join(b"X-%d: %s\r\n" % (number, LONG[:4096]) for number in range(17)),
        REQUEST + b"".join(b"X-%d: a\r\n" % number for number in range(MOST_HEADERS)) + b"\r\n",
    ],
    ids=["address", "endless address", "header", "endless header", "endless name", "headers", "many headers"],
)
@pytest.mark.parametrize("piece", [10**6, 1500])
async def test_headers_that_are_too_long_or_too_many_are_a_431(sent: bytes, piece: int) -> None:
    async with connection() as client:
        for begin in range(0, len(sent), piece):
            await client.send(sent[begin : begin + piece])
        status, headers, body = await client.answer()
        assert status == 431
        assert json.loads(body)["error"]["code"] == "headers_too_large"
        assert len(headers["x-request-id"]) == 32
        await client.end()


async def test_as_many_headers_as_are_allowed_are_taken() -> None:
    async with connection() as client:
        headers = b"".join(b"X-%d: a\r\n" % number for number in range(MOST_HEADERS - 2))
        await client.send(REQUEST + headers + b"Content-Length: 0\r\n\r\n")
        assert (await client.answer())[0] == 200


async def test_what_is_no_http_is_a_400_in_the_shape_of_other_errors() -> None:
    async with connection() as client:
        await client.send(b"\x16\x03\x01\x02\x00\x01")  # a client that speaks TLS
        status, headers, body = await client.answer()
        assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_http")
        assert headers["content-type"] == "application/json"
        await client.end()


async def test_who_sends_too_long_a_body_reads_why_and_cannot_go_on_for_ever() -> None:
    async with connection(header_seconds=0.5) as client:
        await client.send(REQUEST + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"1000\r\n" + b"a" * 4096 + b"\r\n"
        await client.send(chunk)
        assert (await client.answer())[0] == 413
        ended = asyncio.create_task(client.end())
        while not ended.done():
            await client.send(chunk)
            await asyncio.wait((ended,), timeout=0.02)
