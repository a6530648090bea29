"""Bodies: packed ones, and many at once."""

import asyncio
import contextlib
import gzip
import threading
import zlib
from collections.abc import AsyncIterator

import pytest
from fastapi import FastAPI, Request

from persimmon.server.http import errors
from persimmon.server.http.transport.body import BYTES_AT_ONCE, FREE_BYTES, BodyReader
from persimmon.server.settings.engine import BODIES_TOGETHER
from tests.server.http.raw import Answer, RawClient, connected, listening

pytestmark = pytest.mark.anyio

MAX_BYTES = 4 * FREE_BYTES
HEAD = b"POST /length HTTP/1.1\r\nHost: server\r\n"
TEXT = b"persimmon " * 1000


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[tuple[str, int]]:
    """A server that answers the length of a body."""
    app = FastAPI()
    errors.install(app)
    bodies = BodyReader(MAX_BYTES, 600)

    @app.post("/length")
    async def length(request: Request) -> int:
        return len(await bodies.read(request, bytes))

    async with listening(app) as address:
        yield address


@pytest.mark.parametrize(("length", "in_the_loop"), [(BYTES_AT_ONCE, True), (BYTES_AT_ONCE + 1, False)])
async def test_a_long_body_is_parsed_off_the_event_loop(length: int, in_the_loop: bool) -> None:
    threads = []

    def parse(body: bytes) -> int:
        threads.append(threading.get_ident())
        return len(body)

    app = FastAPI()
    bodies = BodyReader(MAX_BYTES, 600)

    @app.post("/length")
    async def answer(request: Request) -> int:
        return await bodies.read(request, parse)

    async with listening(app) as address, connected(*address) as client:
        await client.send(HEAD + b"Content-Length: %d\r\n\r\n" % length + b"a" * length)
        assert (await client.answer()).body == str(length).encode()
    assert [thread == threading.get_ident() for thread in threads] == [in_the_loop]


async def answer_to(encoding: str, body: bytes) -> Answer:
    async with serving() as address, connected(*address) as client:
        await client.send(HEAD + f"Content-Encoding: {encoding}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        return await client.answer()


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP", "identity, gzip"])
async def test_a_body_in_gzip_is_unpacked(encoding: str) -> None:
    assert (await answer_to(encoding, gzip.compress(TEXT))).body == b"10000"


async def test_members_of_gzip_may_follow_one_another() -> None:
    assert (await answer_to("gzip", gzip.compress(TEXT) * 3)).body == b"30000"
    assert (await answer_to("gzip", gzip.compress(b""))).body == b"0"


async def test_a_packed_body_may_come_byte_by_byte() -> None:
    packed = gzip.compress(TEXT)
    async with serving() as address, connected(*address) as client:
        await client.send(HEAD + b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n")
        for byte in packed:
            await client.send(b"1\r\n%c\r\n" % byte)
        await client.send(b"0\r\n\r\n")
        assert (await client.answer()).body == b"10000"


async def test_what_grows_beyond_the_limit_is_a_413() -> None:
    assert (await answer_to("gzip", gzip.compress(bytes(MAX_BYTES)))).body == str(MAX_BYTES).encode()
    for length in (MAX_BYTES + 1, 100 * MAX_BYTES):
        assert (await answer_to("gzip", gzip.compress(bytes(length)))).status == 413


@pytest.mark.parametrize(
    "body",
    [b"", b"abc", gzip.compress(TEXT)[:-1], gzip.compress(TEXT) + b"abc", zlib.compress(TEXT)],
    ids=["nothing", "letters", "cut off", "letters behind", "zlib"],  # gzip writes the time, and ids must not change
)
async def test_what_is_not_gzip_is_a_400(body: bytes) -> None:
    answer = await answer_to("gzip", body)
    assert (answer.status, answer.error["code"]) == (400, "invalid_encoding")


@pytest.mark.parametrize("encoding", ["br", "zstd", "deflate", "gzip, gzip", "aws-chunked"])
async def test_another_encoding_is_a_415_that_says_which_is_read(encoding: str) -> None:
    answer = await answer_to(encoding, TEXT)
    assert (answer.status, answer.headers["accept-encoding"]) == (415, "gzip")
    assert repr(encoding) in answer.error["message"]


async def test_bodies_that_are_being_received_are_bounded_together() -> None:
    """Each holds its last byte back."""
    async with serving() as address, contextlib.AsyncExitStack() as stack:

        async def sends_nearly_all() -> RawClient:
            client = await stack.enter_async_context(connected(*address))
            await client.send(HEAD + b"Content-Length: %d\r\n\r\n" % MAX_BYTES + b"a" * (MAX_BYTES - 1))
            return client

        holders = [await sends_nearly_all() for _ in range(BODIES_TOGETHER + 3)]
        answers = {asyncio.create_task(holder.answer()): holder for holder in holders}
        refused: set[asyncio.Task[Answer]] = set()
        while len(refused) < 2:  # the free bytes of each leave room for one more
            done, _ = await asyncio.wait(set(answers) - refused, return_when=asyncio.FIRST_COMPLETED)
            refused |= done
        for task in refused:
            assert (task.result().status, task.result().error["code"]) == (429, "overloaded")
            assert int(task.result().headers["retry-after"]) >= 1
        # Short ones are received all the same.
        short = await stack.enter_async_context(connected(*address))
        await short.send(HEAD + b"Content-Length: 1000\r\n\r\n" + b"a" * 1000)
        assert (await short.answer()).status == 200
        for task in set(answers) - refused:
            await answers[task].send(b"a")
            assert (await task).body == str(MAX_BYTES).encode()
        # There is room again.
        last = await sends_nearly_all()
        await last.send(b"a")
        assert (await last.answer()).status == 200
