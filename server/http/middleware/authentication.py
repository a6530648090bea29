"""Whose request it is: asks for an API key where the server has some, and holds each key to its limits.

Refuses before the body is read.  Knows nothing of what a request is for.
"""

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from persimmon.server.http.errors import ApiError
from persimmon.server.http.middleware.key_limits import KeyLimiter
from persimmon.server.http.middleware.keys import KeyRing
from persimmon.server.http.request_record import record_of

KEY_HEADERS = ("x-api-key", "api-key")
"""Headers that hold nothing but a key: Anthropic's clients send the first, Azure's the second."""


@dataclass(slots=True)
class KeyCheck:
    """The keys that are let in now.

    Attributes:
        keys: all that there are.
        limiter: counts each key's requests; None without limits.
    """

    keys: KeyRing
    limiter: KeyLimiter | None = None

    def replace(self, keys: KeyRing) -> None:
        """Lets in these keys and no others from now on; requests under way go on."""
        if self.limiter is not None:
            self.limiter.replace(keys.digests)
        self.keys = keys


class Authentication:
    """Lets requests in by their key.

    Args:
        app: answers those that are let in.
        check: the keys, which may change.
        open_paths: what is answered without a key.
    """

    def __init__(self, app: ASGIApp, check: KeyCheck, open_paths: Collection[str]) -> None:
        self._app = app
        self._check = check
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        try:
            with self._let_in(scope):
                await self._app(scope, receive, send)
        except ApiError as error:  # of the key: the application's own are answered in it
            await error.response()(scope, receive, send)

    @contextlib.contextmanager
    def _let_in(self, scope: Scope) -> Iterator[None]:
        headers = Headers(scope=scope)
        bare = next((headers[name] for name in KEY_HEADERS if name in headers), None)
        owner = self._check.keys.owner(headers.get("authorization"), bare)
        if owner is None:
            yield
            return
        record = record_of(scope)
        record.key, record.cache_salt = owner.name, owner.cache_salt
        record.max_priority, record.share = owner.max_priority, owner.share
        if self._check.limiter is None:
            yield
            return
        with self._check.limiter.request(owner.digest):
            yield
