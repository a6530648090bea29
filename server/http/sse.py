"""Server-sent events: the framing, and a response whose work ends at once when its client goes away."""

import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.http.disconnect import until_disconnect
from server.http.errors import EXPECTED, as_api_error

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
"""The last event of a stream that ended well."""

_encode = msgspec.json.Encoder().encode


def event(payload: Any) -> bytes:
    """One event that carries a msgspec struct as JSON."""
    return b"data: %b\n\n" % _encode(payload)


class EventStream(Response):
    """A stream of events.

    The status line waits for the first frame, so that an error before it is an ordinary error response.  A
    later one is a last event of OpenAI's error shape, with no [DONE] after it.

    Args:
        frames: encoded events; several in one item are one write.  Closed when the stream ends, in any way.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes, None]) -> None:
        self.status_code = 200
        self.background = None
        self._frames = frames
        # X-Accel-Buffering: nginx would otherwise collect events before it passes them on.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Writes the stream until it ends or the client goes away."""
        with contextlib.suppress(ClientDisconnect):  # nobody is left to be told
            await until_disconnect(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        started = False
        try:
            async with contextlib.aclosing(self._frames) as frames:
                async for frame in frames:
                    if not started:
                        started = True
                        await send(
                            {
                                "type": "http.response.start",
                                "status": self.status_code,
                                "headers": self.raw_headers,
                            }
                        )
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
        except Exception as error:
            if not started:
                raise
            if not isinstance(error, EXPECTED):
                logger.exception("a stream ends with an error")
            last = event(as_api_error(error).body)
            await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
