"""A small HTTP/1.1 client for measurements: one request at a time on a kept connection, each read with its time.

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
    """Where a server listens and what requests to it carry.

    Attributes:
        host, port: of a base URL.
        path: what the paths of requests start with.
        encrypted: whether it speaks TLS.
        api_key: sent as a bearer token; "" sends none.
    """

    host: str
    port: int
    path: str = ""
    encrypted: bool = False
    api_key: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError(
                "the API key has characters that are not allowed in an HTTP header; expected printable ASCII"
            )

    @classmethod
    def from_url(cls, url: str, api_key: str = "") -> "Endpoint":
        """The endpoint of a URL like http://127.0.0.1:8000, or with /v1 at its end as OpenAI's clients want it.

        Raises:
            ValueError: it is not an http or https URL with a host, or the key cannot be sent.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise ValueError(f"{url!r} is not a server URL; expected one like http://127.0.0.1:8000") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not a server URL; expected one like http://127.0.0.1:8000")
        encrypted = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(
            host=parts.hostname,
            port=port or (443 if encrypted else 80),
            path=path,
            encrypted=encrypted,
            api_key=api_key,
        )

    @property
    def authority(self) -> str:
        """Host and port as the Host header has them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The base URL, without user names or keys."""
        return f"{'https' if self.encrypted else 'http'}://{self.authority}{self.path}"

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The bytes of a whole HTTP/1.1 request.

        Args:
            method: GET or POST.
            path: below the endpoint's.
            body: JSON, or nothing.
        """
        authorization = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        head = (
            f"{method} {self.path}{path} HTTP/1.1\r\nHost: {self.authority}\r\n{authorization}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


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
            self._fail(ConnectionError(f"the server's answer is not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(ConnectionError(f"the server closed the connection during an answer ({exc or 'EOF'})"))

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
        self.close()

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
        if self._transport is None or self._transport.is_closing():
            self._reader = _ResponseReader()
            self._transport, _ = await asyncio.get_running_loop().create_connection(
                lambda: self._reader, endpoint.host, endpoint.port, ssl=True if endpoint.encrypted else None
            )
        whole = self._reader.expect(time.perf_counter())
        self._transport.write(endpoint.request(method, path, body))
        try:
            return await whole
        except BaseException:
            self.close()  # what is left of this response would be taken for the next one
            raise

    def close(self) -> None:
        """Closes the connection; the next request opens it again."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None


class ConnectionPool:
    """Connections to one server, as many as there are requests in flight at once.

    Use as an async context manager.
    """

    # Below what servers keep an idle connection for (uvicorn: 5 s), so that none is closed as a request is sent.
    IDLE_SECONDS = 2.0

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._idle: list[tuple[float, Connection]] = []

    async def __aenter__(self) -> "ConnectionPool":
        return self

    async def __aexit__(self, *exception: object) -> None:
        for _, connection in self._idle:
            connection.close()
        self._idle.clear()

    async def post(self, path: str, body: bytes) -> Response:
        """POSTs a JSON body on an idle connection, or a new one where there is none.

        Raises:
            OSError: no connection, or it broke before the response was whole.
        """
        connection = self._take()
        try:
            return await connection.post(path, body)
        finally:
            self._idle.append((time.perf_counter(), connection))

    def _take(self) -> Connection:
        """The connection used last, closed if it has been idle for long, or a new one."""
        if not self._idle:
            return Connection(self._endpoint)
        idle_since, connection = self._idle.pop()
        if time.perf_counter() - idle_since > self.IDLE_SECONDS:
            connection.close()  # it opens again
        return connection
