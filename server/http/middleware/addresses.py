"""Which endpoint an address means: a slash too many, a /v1 too few or too many, and HEAD for GET.

Clients put their base URL together in several ways.  Answering is kinder than a redirect, which many of them follow
with a GET, or not at all.  Knows the endpoints' paths and nothing of what they do.
"""

import re
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_VERSION = "/v1"
_SLASHES = re.compile("//+")


class Addresses:
    """Puts requests on the endpoint that their address means.

    Args:
        app: answers them.
        paths: of the endpoints.
    """

    def __init__(self, app: ASGIApp, paths: Collection[str]) -> None:
        self._app = app
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] not in self._paths:
            scope["path"] = self._meant(scope["path"])
        if scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        scope["method"] = "GET"
        try:
            await self._app(scope, receive, without_body)
        finally:
            scope["method"] = "HEAD"  # as the log has it

    def _meant(self, path: str) -> str:
        path = _SLASHES.sub("/", path).rstrip("/") or "/"
        bare = path
        while bare.startswith(_VERSION + "/"):
            bare = bare.removeprefix(_VERSION)
        candidates = (path, _VERSION + bare, bare)
        return next((candidate for candidate in candidates if candidate in self._paths), path)
