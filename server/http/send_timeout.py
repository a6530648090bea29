"""uvicorn's HTTP/1.1 protocol with a bound on how long a client may leave what was sent to it.

uvicorn holds an answer back when 64 KiB of it wait to be sent, and waits for ever: each client that stays and does not
read would keep that and what the engine has made for it.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class SendTimeoutProtocol(HttpToolsProtocol):
    """One connection.

    Args:
        *args, **kwargs: uvicorn's.
        send_seconds: a client that takes too little of what waits, three quarters of 64 KiB, in this time is gone.
    """

    def __init__(self, *args: Any, send_seconds: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._send_seconds = send_seconds
        self._send_deadline: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        """Called when more than 64 KiB wait."""
        super().pause_writing()
        self._send_deadline = self.loop.call_later(self._send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Called when a quarter of that is left, or less."""
        super().resume_writing()
        self._forget_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called when it has ended, whoever ended it."""
        self._forget_deadline()
        super().connection_lost(exc)

    def _forget_deadline(self) -> None:
        if self._send_deadline is not None:
            self._send_deadline.cancel()
            self._send_deadline = None
