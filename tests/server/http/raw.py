"""A server of any ASGI application on a port of this machine, and clients that write bytes as they like."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp

from persimmon.server.http.transport.uvicorn_server import HttpServer

PATIENT = 600.0
"""Seconds that no test waits for."""


@contextlib.asynccontextmanager
async def listening(
    app: ASGIApp, header_seconds: float = PATIENT, send_seconds: float = PATIENT, lifespan: bool = False
) -> AsyncIterator[tuple[str, int]]:
    """Serves an application for the length of a block; host and port."""
    listener = socket.create_server(("127.0.0.1", 0))
    running = HttpServer(
        app,
        header_seconds=header_seconds,
        send_seconds=send_seconds,
        keep_alive_seconds=PATIENT,
        lifespan=lifespan,
    )
    serving = asyncio.create_task(running.serve(sockets=[listener]))
    try:
        yield listener.getsockname()
    finally:
        running.should_exit = running.force_exit = True
        await serving


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        status: HTTP's.
        headers: by their names in lower case.
        body: without the framing of chunks.
    """

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """What is in an error's body."""
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error


@dataclass(frozen=True)
class RawClient:
    """A connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        """Writes bytes, unless the server has closed the connection."""
        self.writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    async def answer(self, *, to_head: bool = False) -> Answer:
        """The next answer, with a Content-Length or chunked, or to the end of the connection."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        status, *lines = head.strip().split("\r\n")
        assert status.startswith("HTTP/1.1 ")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = b""
        if to_head:
            pass
        elif "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
        elif headers.get("transfer-encoding") == "chunked":
            while size := int(await self.reader.readline(), 16):
                body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readexactly(2)
        else:
            body = await self.reader.read()
        return Answer(int(status.split()[1]), headers, body)

    async def end(self) -> bytes:
        """What still comes before the server hangs up."""
        received = b""
        with contextlib.suppress(ConnectionError):
            while data := await self.reader.read(65536):
                received += data
        return received


@contextlib.asynccontextmanager
async def connected(host: str, port: int, limit: int = 2**20) -> AsyncIterator[RawClient]:
    """A client for the length of a block, which no test makes longer than a minute."""
    async with asyncio.timeout(60):
        reader, writer = await asyncio.open_connection(host, port, limit=limit)
        try:
            yield RawClient(reader, writer)
        finally:
            writer.close()
