"""Two replicas behind a plain proxy are restarted one after the other under load, and no request is lost."""

import asyncio
import contextlib
import itertools
import json
import re
import signal
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.end_to_end.serving import Server

pytestmark = pytest.mark.anyio

CLIENTS = 4
ASKED = {"prompt": "human: Hello!\n\nadept:", "max_tokens": 32, "ignore_eos": True, "stream": True}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Proxy:
    """Passes each request on to one of its servers: to the next if it cannot connect, or gets a 503.

    A server that has given a byte of another answer is the one that answers.
    """

    def __init__(self) -> None:
        self.ports: list[int] = []
        self.retried = 0
        self._turns = itertools.count()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            assert length is not None
            request = head + await reader.readexactly(int(length[1]))
            turn = next(self._turns)
            for attempt in range(len(self.ports)):
                answer = await self._begin(self.ports[(turn + attempt) % len(self.ports)], request)
                if answer is not None:
                    break
                self.retried += 1
            else:
                return
            first, upstream, to_upstream = answer
            with contextlib.closing(to_upstream):
                writer.write(first)
                while part := await upstream.read(65536):
                    writer.write(part)
                await writer.drain()

    async def _begin(
        self, port: int, request: bytes
    ) -> tuple[bytes, asyncio.StreamReader, asyncio.StreamWriter] | None:
        """The first bytes of an answer, and where the others come from."""
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.suppress(OSError):
                writer.write(request)
                first = await reader.read(65536)
                if first and not first.startswith(b"HTTP/1.1 503"):
                    return first, reader, writer
            writer.close()
        return None


async def test_a_rolling_restart_loses_no_request() -> None:
    def start() -> Server:
        return Server("--kv-cache-memory", "64MB")

    proxy = Proxy()
    servers = [await asyncio.to_thread(start) for _ in range(2)]
    proxy.ports = [httpx.URL(server.url).port or 0 for server in servers]
    over = asyncio.Event()
    answers = asyncio.Queue[int]()

    async def ask_on(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60, headers={"Connection": "close"}) as client:
            while not over.is_set():
                response = await client.post("/v1/completions", json=ASKED)
                assert response.status_code == 200, response.text
                assert response.text.endswith("data: [DONE]\n\n"), response.text[-500:]
                pieces = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
                assert pieces[-1]["choices"][0]["finish_reason"] == "length"
                answers.put_nowait(len(pieces))

    async def more(count: int) -> None:
        while not answers.empty():
            answers.get_nowait()
        async with asyncio.timeout(60):
            for _ in range(count):
                await answers.get()

    try:
        async with proxy.listening() as url, asyncio.TaskGroup() as clients:
            for _ in range(CLIENTS):
                clients.create_task(ask_on(url))
            for place in range(2):
                await more(2 * CLIENTS)
                assert await asyncio.to_thread(servers[place].stop, signal.SIGTERM) == 0
                await more(CLIENTS)
                servers[place] = await asyncio.to_thread(start)
                proxy.ports[place] = httpx.URL(servers[place].url).port or 0
            await more(2 * CLIENTS)
            over.set()
    finally:
        for server in servers:
            if server.process.poll() is None:
                server.stop()
    assert proxy.retried > 0
