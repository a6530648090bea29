"""Joins parts of a streamed answer that follow each other closely, because each part costs a proxy the same.

Knows ASGI, and nothing of what the parts are.
"""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class JoinedChunks:
    """Sends the first part of a body at once, and the others with at least `seconds` between them.

    Args:
        app: answers.
        seconds: 0 sends every part as it comes.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http" or not self._seconds:
            await self._app(scope, receive, send)
            return
        body = _Body(send, self._seconds)
        try:
            await self._app(scope, receive, body.send)
        finally:
            body.close()


class _Body:
    """The body of one answer."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send = send
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._parts: list[bytes] = []
        self._next_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._sending: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()

    async def send(self, message: Message) -> None:
        """ASGI: takes a message of the application."""
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        self._parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            self._stop_timer()
            await self._flush(more=False)
        elif self._loop.time() >= self._next_at:
            await self._flush(more=True)
        elif self._timer is None:
            self._timer = self._loop.call_at(self._next_at, self._begin_flush)

    def close(self) -> None:
        """The application has returned: nothing more is sent."""
        self._stop_timer()
        if self._sending is not None:
            self._sending.cancel()

    def _begin_flush(self) -> None:
        self._timer = None
        self._sending = self._loop.create_task(self._flush(more=True))

    async def _flush(self, *, more: bool) -> None:
        async with self._turn:
            # The last message is sent even if it is empty: it ends the answer.
            if self._parts or not more:
                body, self._parts = b"".join(self._parts), []
                self._next_at = self._loop.time() + self._seconds
                await self._send({"type": "http.response.body", "body": body, "more_body": more})

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
