"""uvicorn's HTTP/1.1 protocol, but an answer's head goes out together with the first part of its body.

uvicorn writes them one after the other, uvloop sends each at once, and so the system is called and the client woken
twice.  Knows nothing of what is answered.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_INTERIM = b"HTTP/1.1 1"
"""What a 100 Continue begins with, which comes before the head and must not wait."""


class JoinedHeadProtocol(HttpToolsProtocol):
    """One connection."""

    def on_headers_complete(self) -> None:
        """Called when the body begins, if there is one."""
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.transport is self.transport:  # a new request, and no upgrade
            self.cycle.transport = _AnswerTransport(self.transport, self.loop)  # type: ignore[assignment]

    def on_response_complete(self) -> None:
        """Called when an answer has been written."""
        if isinstance(self.cycle.transport, _AnswerTransport):
            self.cycle.transport.flush()
        super().on_response_complete()


class _AnswerTransport:
    """What a request's answer is written to.  Does not know the request, which knows it: nobody would break the circle.

    Args:
        transport: the connection's.
        loop: at the end of whose turn a head goes out without a body.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head_seen = False
        self._held = b""

    def write(self, data: bytes) -> None:
        if self._held:
            data, self._held = self._held + data, b""
        elif not self._head_seen and not data.startswith(_INTERIM):
            self._head_seen = True
            self._held = data
            self._loop.call_soon(self.flush)
            return
        self._transport.write(data)

    def flush(self) -> None:
        held, self._held = self._held, b""
        if held and not self._transport.is_closing():
            self._transport.write(held)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()
