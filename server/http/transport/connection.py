"""One client's connection: which request is answered when, how long anything may take, and when it ends.

Takes the place of uvicorn's protocol classes; uvicorn_server.py makes connections.  Knows asyncio's transports; reads
requests with `RequestReader` and leaves each answer to an `Exchange`.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from starlette.types import ASGIApp, Scope

from persimmon.server.http.errors import ApiError
from persimmon.server.http.request_record import REQUEST_ID_HEADER, RequestRecord
from persimmon.server.http.transport.exchange import BODY_HIGH_WATER, Exchange
from persimmon.server.http.transport.half_closed import HalfClosedWatch
from persimmon.server.http.transport.refusal import refusal
from persimmon.server.http.transport.request_reader import RequestHead, RequestReader
from persimmon.server.logs import with_fields

logger = logging.getLogger(__name__)

MAX_PIPELINED = 8
"""Requests that are read while an earlier one is answered; then the client waits."""


class ServerState(Protocol):
    """What the connections of one server share: uvicorn's class of that name.

    Attributes:
        total_requests: that were answered.
        connections: that are open; `shutdown` of each is called when the server ends.
        tasks: of requests; the server waits for them when it ends.
        default_headers: of every answer.
    """

    total_requests: int
    connections: set[Any]
    tasks: set[asyncio.Task[None]]
    default_headers: list[tuple[bytes, bytes]]


class Connection(asyncio.Protocol):
    """One connection.

    Args:
        app: the application.
        server_state: of the server.
        app_state: of the application's lifespan.
        header_seconds: time from a client's first byte, or from connecting, to the end of its headers.
        send_seconds: time in which a client must take what waits for it, three quarters of 64 KiB.
        keep_alive_seconds: time that the connection stays open without a request.

    Attributes:
        loop: that runs.
        write: sends bytes; what is written to a lost connection is dropped.
        is_full: whether the client should take what was sent before more is sent.
    """

    def __init__(
        self,
        app: ASGIApp,
        server_state: ServerState,
        app_state: dict[str, Any],
        *,
        header_seconds: float,
        send_seconds: float,
        keep_alive_seconds: float,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self._app = app
        self._keep_alive_seconds = keep_alive_seconds
        self._state = server_state
        self._app_state = app_state
        self._header_seconds = header_seconds
        self._send_seconds = send_seconds
        self._transport: asyncio.Transport
        self.write: Callable[[bytes], object]  # the transport's own: a frame less for every token
        self.is_full = False
        self._scope: Scope = {}
        self._reader = RequestReader(self._on_head, self._on_body, self._on_end)
        self._incoming: Exchange | None = None  # whose body is being read
        self._current: Exchange | None = None  # that is being answered
        self._waiting: deque[Exchange] = deque()
        self._refusal: ApiError | None = None  # of what came behind requests that are still being answered
        self._deaf = False  # nothing that comes has a meaning any more
        self._paused = False
        self._writable = asyncio.Event()
        self._writable.set()
        self._deadline: asyncio.TimerHandle | None = None
        self._awaits_headers = False  # whether that is the deadline's reason
        self._send_deadline: asyncio.TimerHandle | None = None
        self._watch: HalfClosedWatch | None = None

    # asyncio's side.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called when a client has connected."""
        self._transport = transport
        self.write = transport.write
        self._state.connections.add(self)
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "server": _address(transport, "sockname"),
            "client": _address(transport, "peername"),
            "scheme": "https" if self._is_tls else "http",
            "root_path": "",
        }
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called when the connection has ended, whichever side ended it."""
        self._state.connections.discard(self)
        self._deaf = True
        for timer in (self._deadline, self._send_deadline):
            if timer is not None:
                timer.cancel()
        if self._watch is not None:
            self._watch.stop()
        for exchange in (self._current, self._incoming, *self._waiting):
            if exchange is not None:
                exchange.disconnect()
        self._current = self._incoming = None
        self._waiting.clear()
        self.is_full = False
        self._writable.set()
        self._reader.close()

    def data_received(self, data: bytes) -> None:
        """Called with what has come."""
        if self._deaf:
            return
        try:
            self._reader.feed(data)
        except ApiError as error:
            self._fail(error)
            return
        # Most requests come whole, and need no deadline.
        if self._current is None and self._incoming is None and not self._awaits_headers:
            self._await_headers()

    def eof_received(self) -> bool:
        """Called when the client will send no more: it has half-closed the connection, or it is gone.

        A request that came whole is answered in either case, as long as the client may be there.  Only writing shows
        whether it is: the system of one that has closed its socket answers with a reset.  So bytes of the answer that
        are known before the answer are sent ahead, one at a time, and the connection is watched.  A proxy of
        connections between them notices its client's end only with the second or third.

        Returns:
            Whether the connection stays open.
        """
        self._deaf = True
        cut_off, self._incoming = self._incoming, None
        if cut_off is not None:
            cut_off.disconnect()
            with contextlib.suppress(ValueError):
                self._waiting.remove(cut_off)
        current = self._current
        if current is None or current.disconnected or self._is_tls:  # asyncio closes TLS connections in both directions
            return False
        self._last.keep_alive = False
        self._watch = HalfClosedWatch(self.loop, self._transport, self._probe)
        return True

    def pause_writing(self) -> None:
        """Called when more than 64 KiB wait for the client."""
        self.is_full = True
        self._writable.clear()
        self._send_deadline = self.loop.call_later(self._send_seconds, self._transport.abort)

    def resume_writing(self) -> None:
        """Called when a quarter of that is left, or less."""
        self.is_full = False
        self._writable.set()
        if self._send_deadline is not None:
            self._send_deadline.cancel()
            self._send_deadline = None

    # The server's side.

    def shutdown(self) -> None:
        """Called when the server ends: the connection closes when it has nothing left to answer."""
        if self._current is None:
            self._close()
        else:
            self._last.keep_alive = False

    # The exchanges' side.

    @property
    def is_closing(self) -> bool:
        """Whether nothing more can be sent."""
        return self._transport.is_closing()

    async def drain(self) -> None:
        """Waits until the client has taken most of what was sent, or is gone."""
        await self._writable.wait()

    def body_taken(self) -> None:
        """The application wants more of a body."""
        self._read_on()

    def answered(self, exchange: Exchange) -> None:
        """An exchange's answer has been written to its end: the next one begins, or the connection waits or ends."""
        self._state.total_requests += 1
        self._current = None
        if self._transport.is_closing():
            return
        if not exchange.keep_alive:
            self._finish()
        elif self._waiting:
            self._start(self._waiting.popleft())
        elif self._refusal is not None:
            self._refuse(self._refusal)
        elif self._incoming is not None or self._reader.in_head:
            # The rest of a body that was refused is thrown away, so that its sender reads why; but not for ever.
            self._await_headers()
        else:
            self._set_deadline(self._keep_alive_seconds)
        self._read_on()

    def break_off(self) -> None:
        """Closes the connection."""
        self._close()

    # What is read.

    def _on_head(self, head: RequestHead) -> None:
        self._cancel_deadline()
        scope = {
            **self._scope,
            "http_version": head.http_version,
            "method": head.method,
            "path": head.decoded_path,
            "raw_path": head.path,
            "query_string": head.query,
            "headers": head.headers,
            "state": self._app_state.copy(),
        }
        exchange = Exchange(wire=self, scope=scope, head=head, default_headers=self._state.default_headers)
        self._incoming = exchange
        if self._current is None:
            self._start(exchange)
        else:
            self._waiting.append(exchange)
            self._pause_if_full()

    def _on_body(self, body: bytes) -> None:
        if self._incoming is not None:
            self._incoming.feed(body)
            self._pause_if_full()

    def _on_end(self) -> None:
        exchange, self._incoming = self._incoming, None
        if exchange is None:
            return
        exchange.end()
        if not exchange.keep_alive:
            self._deaf = True
        if exchange.complete:
            self._set_deadline(self._keep_alive_seconds)

    def _fail(self, error: ApiError) -> None:
        """What came cannot be read, and so nothing after it; requests that came before it are answered first."""
        if self._deaf:
            return
        self._deaf = True
        if self._incoming is not None:
            if self._incoming.complete:
                self._finish()
            else:
                self._incoming.fail(error)
        elif self._current is not None:
            self._refusal = error
        else:
            self._refuse(error)

    # What is done.

    def _start(self, exchange: Exchange) -> None:
        self._current = exchange
        task = self.loop.create_task(exchange.run(self._app))
        self._state.tasks.add(task)
        task.add_done_callback(self._state.tasks.discard)

    def _refuse(self, error: ApiError) -> None:
        """Answers what is not a request, in the shape of every other error, and ends."""
        record = RequestRecord()
        request_id = (REQUEST_ID_HEADER.encode(), record.request_id.encode())
        self.write(refusal(error, (*self._state.default_headers, request_id)))
        client = self._scope["client"]
        fields = with_fields(
            request_id=record.request_id,
            status=error.status,
            error=error.body.error.message,
            client=client[0] if client else None,
        )
        logger.debug("rejected before it could be parsed", extra=fields)
        self._finish(rest_expected=True)

    def _finish(self, *, rest_expected: bool = False) -> None:
        """Ends the connection.

        Closed while there are bytes to read, it would be reset, and the client might lose the answer.  So what still
        comes is thrown away first, for a time.
        """
        self._deaf = True
        if not rest_expected and self._incoming is None:
            self._close()
            return
        self._incoming = None
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._await_headers()
        self._read_on()

    def _close(self) -> None:
        """Closes the connection when the client has taken what was sent, or has had the time."""
        if self._transport.is_closing():
            return
        self._transport.close()
        self._cancel_deadline()
        self._deadline = self.loop.call_later(self._send_seconds, self._transport.abort)

    def _probe(self) -> None:
        if self._current is not None:
            self._current.probe()

    @property
    def _last(self) -> Exchange:
        """The last request that came."""
        last = self._waiting[-1] if self._waiting else self._current
        if last is None:
            raise RuntimeError("no request received")
        return last

    @property
    def _is_tls(self) -> bool:
        return self._transport.get_extra_info("sslcontext") is not None

    # Reading, and deadlines.

    def _pause_if_full(self) -> None:
        incoming = self._incoming
        body = 0 if incoming is None else incoming.waiting_bytes
        if not self._paused and (body > BODY_HIGH_WATER or len(self._waiting) > MAX_PIPELINED):
            self._paused = True
            self._transport.pause_reading()

    def _read_on(self) -> None:
        if self._paused and len(self._waiting) <= MAX_PIPELINED and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()

    def _await_headers(self) -> None:
        self._set_deadline(self._header_seconds)
        self._awaits_headers = True

    def _set_deadline(self, seconds: float) -> None:
        self._cancel_deadline()
        self._deadline = self.loop.call_later(seconds, self._close)

    def _cancel_deadline(self) -> None:
        self._awaits_headers = False
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _address(transport: asyncio.Transport, name: str) -> tuple[str, int] | None:
    """Host and port of one end of a connection."""
    address = transport.get_extra_info(name)
    return (str(address[0]), int(address[1])) if isinstance(address, tuple) else None
