"""uvicorn's HTTP/1.1 protocol with bounds on what comes before a body: how long, how much, how many headers.

httptools keeps what it cannot read to its end yet, without a limit, and uvicorn waits for ever for a request line.
"""

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.http.errors import ApiError
from server.http.request_record import REQUEST_ID_HEADER, RequestRecord

MOST_HEADER_BYTES = 64 * 1024
"""Of a request line and its headers: nginx takes 32 KiB by default, and a long list of baggage fits."""

MOST_HEADERS = 100
"""Gunicorn's limit too."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection.

    Args:
        *args, **kwargs: uvicorn's.
        header_seconds: how long a client may take from its first byte, or from connecting, to the end of its headers.
    """

    def __init__(self, *args: Any, header_seconds: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_seconds = header_seconds
        self._deadline: asyncio.TimerHandle | None = None
        self._in_headers = False  # between the first byte of a request and its body
        self._in_body = False
        self._unread = 0  # bytes that came since the parser told of something last
        self._header_bytes = 0
        self._refusal: ApiError | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called when a client has connected."""
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called when the connection has ended, whoever ended it."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called with what has come."""
        if self._refused:
            return
        self._unread += len(data)
        super().data_received(data)
        # Most requests come whole, and need no deadline.
        if self._in_headers or (self._unread and not self._in_body):
            self._await_headers()
        if self._unread + self._header_bytes > MOST_HEADER_BYTES and not (self._refused or self.transport.is_closing()):
            self._refusal = _too_long()
            self.send_400_response("")

    def on_message_begin(self) -> None:
        """Called by the parser at a request's first byte."""
        super().on_message_begin()
        self._in_headers = True
        self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Called with the next part of the request's address."""
        super().on_url(url)
        self._count(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called with each whole header."""
        self._count(name + value)
        if len(self.headers) >= MOST_HEADERS:
            self._refuse(
                ApiError(
                    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                    f"The request has more than {MOST_HEADERS} headers.",
                    code="headers_too_large",
                )
            )
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Called when the body begins, if there is one."""
        self._stop_waiting()
        self._in_headers = False
        self._in_body = True
        self._unread = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Called with the next part of a body."""
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Called at a request's end."""
        self._in_body = False
        self._unread = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Called when an answer has been written."""
        super().on_response_complete()
        if self._in_body:
            # The rest of a body that was refused is thrown away, so that its sender reads why; but not for ever.
            self._await_headers()

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no request, or one of its headers, in the shape of every other error; then hangs up."""
        error = self._refusal or ApiError(HTTPStatus.BAD_REQUEST, msg, code="invalid_http")
        response = error.response()
        lines = [STATUS_LINE[response.status_code]]
        own = (REQUEST_ID_HEADER.encode(), RequestRecord().request_id.encode())
        for name, value in (*self.server_state.default_headers, *response.raw_headers, own, (b"connection", b"close")):
            lines += [name, b": ", value, b"\r\n"]
        self.transport.write(b"".join([*lines, b"\r\n", response.body]))
        if self.transport.can_write_eof() and (self.cycle is None or self.cycle.response_complete):
            # Closed while there are bytes to read, a connection is reset, and its client may lose what it was told.
            self._refused = True
            self.transport.write_eof()
            self._await_headers()
        else:
            self.transport.close()

    def _count(self, data: bytes) -> None:
        self._header_bytes += len(data)
        self._unread = 0
        if self._header_bytes > MOST_HEADER_BYTES:
            self._refuse(_too_long())

    def _refuse(self, error: ApiError) -> None:
        self._refusal = error
        raise error  # the parser stops at it, and `send_400_response` is called

    def _await_headers(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self._header_seconds, self._give_up)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


def _too_long() -> ApiError:
    return ApiError(
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        f"The request line and its headers are longer than {MOST_HEADER_BYTES} bytes.",
        code="headers_too_large",
    )
