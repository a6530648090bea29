"""One request and its answer: ASGI on one side, the bytes of HTTP/1.1 on the other.

Knows how an answer is framed and that its head goes out together with the first part of its body.  Knows nothing of
other requests on the same connection, and decides nothing about when the connection ends.
"""

import asyncio
import http
import logging
import re
from collections.abc import Callable
from typing import Protocol

from starlette.types import ASGIApp, Message, Scope

from persimmon.server.http.errors import ApiError
from persimmon.server.http.transport.request_reader import RequestHead

logger = logging.getLogger(__name__)

STATUS_PREFIX = b"HTTP/1.1 "
"""What every status line begins with: it can be sent before the status is known."""

BODY_HIGH_WATER = 64 * 1024
"""Bytes of a body that may wait for the application; then the client waits."""

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_MAX_ZEROS = 4
"""In front of a chunk's size.  curl reads sizes of 16 digits."""

_WITHOUT_BODY = (204, 304)
_FORBIDDEN_IN_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


def status_line(status: int) -> bytes:
    """The first line of an answer."""
    try:
        phrase = http.HTTPStatus(status).phrase
    except ValueError:  # a status of our own, like 499
        phrase = ""
    return STATUS_PREFIX + f"{status} {phrase}\r\n".encode()


_STATUS_LINES = {status: status_line(status) for status in range(100, 600)}


class Wire(Protocol):
    """What an exchange needs of its connection."""

    loop: asyncio.AbstractEventLoop
    """Where the connection lives."""

    @property
    def is_closing(self) -> bool:
        """Whether nothing more can be sent."""

    is_full: bool
    """Whether the client should take what was sent before more is sent."""

    async def drain(self) -> None:
        """Waits until it is no longer full."""

    write: Callable[[bytes], object]
    """Sends bytes."""

    def body_taken(self) -> None:
        """The application has taken what had come of a body, and wants more."""

    def answered(self, exchange: "Exchange") -> None:
        """The exchange's answer has been written to its end."""

    def break_off(self) -> None:
        """Closes the connection, so that the client sees that the answer is not whole."""


class Exchange:
    """A request, and what is answered to it.

    Args:
        wire: the connection that it came on.
        scope: the ASGI scope.
        head: the request's.
        default_headers: that each answer gets.

    Attributes:
        keep_alive: whether the connection stays open after the answer.
        disconnected: whether the client is gone.
        complete: whether the answer has been written to its end.
    """

    __slots__ = (
        "_body",
        "_chunked",
        "_default_headers",
        "_error",
        "_event",
        "_expects_continue",
        "_held",
        "_left",
        "_more_body",
        "_prefix_sent",
        "_request",
        "_scope",
        "_started",
        "_wire",
        "_zeros",
        "complete",
        "disconnected",
        "keep_alive",
    )

    def __init__(self, wire: Wire, scope: Scope, head: RequestHead, default_headers: list[tuple[bytes, bytes]]) -> None:
        self._wire = wire
        self._scope = scope
        self._request = head
        self._default_headers = default_headers
        self._event = asyncio.Event()
        self._expects_continue = head.expects_continue
        self._error: ApiError | None = None
        self._body = bytearray()
        self._more_body = True
        self._started = False
        self._prefix_sent = 0
        self._zeros = 0
        self._held = b""
        self._chunked = False
        self._left: int | None = None  # bytes that the answer's Content-Length still promises
        self.keep_alive = head.keep_alive
        self.disconnected = False
        self.complete = False

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the body that the application has not taken yet."""
        return len(self._body)

    # The connection's side.

    def feed(self, data: bytes) -> None:
        """Takes the next part of the body."""
        if not self.complete:
            self._body += data
            self._event.set()

    def end(self) -> None:
        """The body has come to its end."""
        self._more_body = False
        self._event.set()

    def fail(self, error: ApiError) -> None:
        """The rest of the body cannot be read: the application gets this error when it asks for it."""
        self._error = error
        self.keep_alive = False
        self._event.set()

    def disconnect(self) -> None:
        """The client is gone."""
        self.disconnected = True
        self._event.set()

    def probe(self) -> None:
        """Writes a byte that belongs to the answer whatever the answer is, where there is one.

        The system of a client that is gone answers it with a reset.  Before the answer's head it is the next byte of
        what every status line begins with; between two chunks it is a zero in front of the next one's size.
        """
        if not self._started and self._prefix_sent < len(STATUS_PREFIX):
            self._wire.write(STATUS_PREFIX[self._prefix_sent : self._prefix_sent + 1])
            self._prefix_sent += 1
        elif self._chunked and not (self._held or self.complete) and self._zeros < _MAX_ZEROS:
            self._wire.write(b"0")
            self._zeros += 1

    # The application's side.

    async def run(self, app: ASGIApp) -> None:
        """Has the application answer."""
        try:
            await app(self._scope, self.receive, self.send)
        except asyncio.CancelledError:
            self._wire.break_off()
            raise
        except Exception:
            # The application answers every error that it can; what comes here is a fault of its outermost layer.
            logger.exception("an answer ended early")
            self._wire.break_off()
        else:
            if not self.complete and not self.disconnected:
                logger.error("the application returned before its answer was complete")
                self._wire.break_off()

    async def receive(self) -> Message:
        """ASGI: the next part of the body, or that the client is gone."""
        if self._expects_continue and not self._wire.is_closing and self._error is None:
            self._expects_continue = False
            self._wire.write(CONTINUE)
        if not self.disconnected and not self.complete:
            self._wire.body_taken()
            await self._event.wait()
            self._event.clear()
        if self.disconnected or self.complete:
            return {"type": "http.disconnect"}
        if self._error is not None:
            raise self._error
        body, self._body = bytes(self._body), bytearray()
        return {"type": "http.request", "body": body, "more_body": self._more_body}

    async def send(self, message: Message) -> None:
        """ASGI: sends the next part of the answer."""
        if self._wire.is_full and not self.disconnected:
            await self._wire.drain()
        if self.disconnected:
            await asyncio.sleep(0)  # an application that never waits would not be stopped otherwise
            return
        if not self._started:
            self._held = self._head(message)
            self._started = True
            # Most answers, or their first event, follow in the same turn of the loop and go out in the same write.
            self._wire.loop.call_soon(self._flush)
        elif self.complete:
            raise RuntimeError("the answer is complete already")
        else:
            self._write_body(message.get("body", b""), message.get("more_body", False))

    def _head(self, message: Message) -> bytes:
        """The status line and headers; decides how the body is framed."""
        if message["type"] != "http.response.start":
            raise RuntimeError(f"expected http.response.start, not {message['type']}")
        self._expects_continue = False
        status: int = message["status"]
        parts = [_STATUS_LINES[status]]
        says_close = False
        for name, value in (*self._default_headers, *message.get("headers", ())):
            if _FORBIDDEN_IN_VALUE.search(value):
                raise RuntimeError(f"the header {name!r} has a control character in its value")
            if name == b"content-length":
                self._left = int(value)
            elif name == b"connection" and b"close" in value.lower():
                self.keep_alive = False
                says_close = True
            parts += (name, b": ", value, b"\r\n")
        if self._left is None:
            if self._request.method == "HEAD" or status in _WITHOUT_BODY:
                self._left = 0
            elif self._request.http_version == "1.1":
                self._chunked = True
                parts.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keep_alive = False  # the end of the connection is the end of the body
        if not self.keep_alive and not says_close:
            parts.append(b"connection: close\r\n")
        elif self.keep_alive and self._request.http_version == "1.0":
            parts.append(b"connection: keep-alive\r\n")
        if self._request.method == "HEAD":
            self._left = 0
        parts.append(b"\r\n")
        head = b"".join(parts)
        return head[self._prefix_sent :] if self._prefix_sent else head

    def _write_body(self, body: bytes, more: bool) -> None:
        if self._request.method == "HEAD":
            body = b""
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            data = data if more else data + b"0\r\n\r\n"
            self._zeros = 0 if data else self._zeros
        else:
            data = body
            if self._left is not None:
                self._left -= len(body)
                if self._left < 0 or (self._left and not more):
                    raise RuntimeError("the body is not as long as its Content-Length")
        if self._held:
            data, self._held = self._held + data, b""
        if data:
            self._wire.write(data)
        if not more:
            self.complete = True
            self._event.set()
            self._body = bytearray()
            self._wire.answered(self)

    def _flush(self) -> None:
        if self._held and not self.disconnected:
            held, self._held = self._held, b""
            self._wire.write(held)
