"""Asks an ASGI application in its own process, as a server asks it, with no network between them.

Knows ASGI and nothing of endpoints.
"""

import asyncio
import logging
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Scope

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Response:
    """What the application answered.

    Attributes:
        status: HTTP's status code.
        body: all of it.
    """

    status: int
    body: bytes


async def post(app: ASGIApp, path: str, body: bytes) -> Response:
    """The application's answer to a POST with a JSON body.  Cancelled, it ends what the application does for it.

    Args:
        app: answers exceptions of its own with a response, as Starlette's do.
        path: of the URL.
        body: JSON.
    """
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": None,
        "server": None,
    }
    sent: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    status: int | None = None
    parts: list[bytes] = []

    async def receive() -> Message:
        if sent:
            return sent.pop()
        # This client never leaves; who waits for that is cancelled when the answer is there.
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception:
        # Starlette raises what it has answered once more, for the log of the server that it believes in.
        if status is None:
            raise
        logger.exception("the application answered %d", status)
    if status is None:
        raise RuntimeError("the application has not answered")
    return Response(status, b"".join(parts))
