"""Server-sent events: the framing, and a response whose work ends at once when its client goes away."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterator
from typing import Any, Generic, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from persimmon.server.http.errors import EXPECTED, as_api_error
from persimmon.server.http.transport.disconnect import until_disconnect

logger = logging.getLogger(__name__)

_Chunk = TypeVar("_Chunk", bound=msgspec.Struct)

DONE = b"data: [DONE]\n\n"
"""The last event of a stream that ended well."""

PING = b": ping\n\n"
"""A comment, which clients skip: it shows proxies that a quiet stream is alive."""

_encode = msgspec.json.Encoder().encode


def event(payload: Any) -> bytes:
    """One event that carries a msgspec struct as JSON."""
    return b"data: %b\n\n" % _encode(payload)


class EventStream(Response, Generic[_Chunk]):
    """A stream of events.  An endpoint that declares it as its answer is documented with the schema of its chunks.

    The status line waits for the first frame or, where that takes long, for the first ping, so that an error before it
    is an ordinary error response.  A later one is a last event of OpenAI's error shape, with no [DONE] after it.

    Args:
        frames: encoded events; several in one item are one write.  Closed when the stream ends, in any way.
        ping_interval: seconds without a frame after which a comment is sent; 0 for never.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes, None], ping_interval: float = 0.0) -> None:
        self.status_code = 200
        self.background = None
        self._frames = frames
        self._ping_interval = ping_interval
        # X-Accel-Buffering: nginx would otherwise collect events before it passes them on.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Writes the stream until it ends or the client goes away."""
        start: Message = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        with contextlib.suppress(ClientDisconnect):  # the client is gone
            await until_disconnect(receive, self._write(_Wire(send, start), scope))

    async def _write(self, wire: "_Wire", scope: Scope) -> None:
        try:
            with wire.pinged(self._ping_interval):
                async with contextlib.aclosing(self._frames) as frames:
                    async for frame in frames:
                        await wire.write(frame)
        except Exception as error:
            if not wire.started:
                raise
            if not isinstance(error, EXPECTED):
                logger.exception("a stream ends with an error")
            known = as_api_error(error)
            known.note(scope)
            await wire.write(event(known.body))
        await wire.write(b"", more=False)


class _Wire:
    """What a stream is written to, by its own task and by the timer of its pings.

    Args:
        send: the request's ASGI channel.
        start: the message that begins the response.

    Attributes:
        started: whether it has been sent, or is being sent.
    """

    def __init__(self, send: Send, start: Message) -> None:
        self._send = send
        self._start = start
        self._turn = asyncio.Lock()  # a ping that waits for a slow client must not be overtaken
        self._written = 0.0
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._pinging: asyncio.Task[None] | None = None
        self._pings = False
        self.started = False

    async def write(self, body: bytes, *, more: bool = True) -> None:
        """Sends a part of the body."""
        self._written = self._loop.time()
        first, self.started = not self.started, True
        async with self._turn:
            if first:
                await self._send(self._start)
            await self._send({"type": "http.response.body", "body": body, "more_body": more})

    @contextlib.contextmanager
    def pinged(self, interval: float) -> Iterator[None]:
        """Sends a ping whenever nothing has been written for `interval` seconds, for the duration of a block."""
        self._written = self._loop.time()
        if interval:
            self._pings = True
            self._timer = self._loop.call_later(interval, self._ping, interval)
        try:
            yield
        finally:
            self._pings = False
            if self._timer is not None:
                self._timer.cancel()

    def _ping(self, interval: float) -> None:
        quiet = self._loop.time() - self._written
        # A ping under way waits for a client that does not read, and so would the next one.
        if quiet >= interval and not self._turn.locked():
            self._pinging = self._loop.create_task(self._write_ping())
            quiet = 0.0
        self._timer = self._loop.call_later(max(interval - quiet, interval / 8), self._ping, interval)

    async def _write_ping(self) -> None:
        if self._pings:  # the stream may have ended since the timer went off
            await self.write(PING)
