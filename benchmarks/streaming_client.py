"""A small HTTP/1.1 client for benchmarks: one request at a time on a kept connection, each read with its time.

Knows nothing of tokens or of what the bodies mean.  While a response arrives it only stores bytes, so that the
cores are the server's on a machine that runs both.
"""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httptools


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens: host and port of a base URL, and the path that requests start with."""

    host: str
    port: int
    path: str = ""
    encrypted: bool = False

    @classmethod
    def from_url(cls, url: str) -> "Endpoint":
        """The endpoint of a URL like http://127.0.0.1:8000.

        Raises:
            ValueError: it is not an http or https URL with a host.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no server's URL; it looks like http://127.0.0.1:8000")
        encrypted = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if encrypted else 80), parts.path.rstrip("/"), encrypted)


@dataclass
class Response:
    """A response as it arrived.

    Attributes:
        started: when the request was handed to the socket, in seconds of time.perf_counter().
        finished: when the last byte of the body was read.
        status: the HTTP status code.
        pieces: (when it was read, bytes) for each part of the body, in order.
    """

    started: float
    finished: float = 0.0
    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(piece for _, piece in self.pieces)

    def events(self) -> Iterator[tuple[float, bytes]]:
        """The server-sent events, each as (when its last byte was read, its data)."""
        unread = b""
        for read_at, piece in self.pieces:
            *lines, unread = (unread + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield read_at, line[5:].strip()


class _ResponseReader(asyncio.Protocol):
    """Collects one response at a time from a connection.

    Its `on_` methods are httptools' callbacks.
    """

    def __init__(self) -> None:
        self._read_at = 0.0
        self._response = Response(started=0.0)
        self._whole: asyncio.Future[Response] | None = None
        self._parser = httptools.HttpResponseParser(self)

    def expect(self, started: float) -> asyncio.Future[Response]:
        """The response to the request that is sent next."""
        self._response = Response(started)
        self._parser = httptools.HttpResponseParser(self)
        self._whole = asyncio.get_running_loop().create_future()
        return self._whole

    def data_received(self, data: bytes) -> None:
        self._read_at = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"the server sent no HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(ConnectionError(f"the server closed the connection in the middle of an answer ({exc or 'EOF'})"))

    def on_body(self, body: bytes) -> None:
        self._response.pieces.append((self._read_at, body))

    def on_message_complete(self) -> None:
        self._response.status = self._parser.get_status_code()
        self._response.finished = self._read_at
        if self._whole is not None and not self._whole.done():
            self._whole.set_result(self._response)

    def _fail(self, error: ConnectionError) -> None:
        if self._whole is not None and not self._whole.done():
            self._whole.set_exception(error)


class Connection:
    """A kept connection to a server, opened when first needed and again after it was closed.

    One request at a time; use as an async context manager.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._transport: asyncio.Transport | None = None
        self._reader = _ResponseReader()

    async def __aenter__(self) -> "Connection":
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._close()

    async def get(self, path: str) -> Response:
        """GETs a path below the endpoint's.

        Raises:
            OSError: no connection, or it broke before the response was whole.
        """
        return await self._request("GET", path, b"")

    async def post(self, path: str, body: bytes) -> Response:
        """POSTs a JSON body to a path below the endpoint's.

        Raises:
            OSError: no connection, or it broke before the response was whole.
        """
        return await self._request("POST", path, body)

    async def _request(self, method: str, path: str, body: bytes) -> Response:
        endpoint = self._endpoint
        head = (
            f"{method} {endpoint.path}{path} HTTP/1.1\r\nHost: {endpoint.host}:{endpoint.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        if self._transport is None or self._transport.is_closing():
            self._reader = _ResponseReader()
            self._transport, _ = await asyncio.get_running_loop().create_connection(
                lambda: self._reader, endpoint.host, endpoint.port, ssl=True if endpoint.encrypted else None
            )
        whole = self._reader.expect(time.perf_counter())
        self._transport.write(head.encode() + body)
        try:
            return await whole
        except BaseException:
            self._close()  # what is left of this response would be taken for the next one
            raise

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
