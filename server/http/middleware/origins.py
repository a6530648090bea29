"""Which web pages may have the server work.

A browser sends a page's POST to any address, without asking first where it is a simple one, and a server on a person's
own machine often has no keys.  Every browser names the page's origin with it.  Programs name none and are not affected.
"""

import ipaddress
import socket
import urllib.parse
from collections.abc import Collection
from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from persimmon.server.http.errors import ApiError
from persimmon.server.http.request_record import header

ANY_ORIGIN = "*"

_READING = ("GET", "HEAD", "OPTIONS")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


class OriginCheck:
    """Refuses what pages of foreign origins send, before anything runs.

    A page of the server's own origin is let in.  Without keys its host must also be one that no stranger can point at
    this machine: with a name of his own that resolves to 127.0.0.1 his page has the same origin as the server.

    Args:
        app: answers what is let in.
        allowed: origins that are let in, or `ANY_ORIGIN`.
        has_keys: whether requests need a key, which a stranger's page does not know.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str], has_keys: bool) -> None:
        self._app = app
        self._allowed = frozenset(allowed)
        self._has_keys = has_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] == "http" and scope["method"] not in _READING:
            origin = header(scope, b"origin")
            if origin is not None and not self._lets_in(origin, header(scope, b"host") or ""):
                await _refusal(origin).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _lets_in(self, origin: str, host: str) -> bool:
        if origin in self._allowed or ANY_ORIGIN in self._allowed:
            return True
        scheme, _, own = origin.partition("://")
        default = _DEFAULT_PORTS.get(scheme)
        # The scheme may differ where a proxy speaks TLS; the port then is the scheme's default.
        same = default is not None and own.lower().removesuffix(default) == host.lower().removesuffix(default)
        return same and (self._has_keys or _belongs_to_this_machine(own))


def _belongs_to_this_machine(host: str) -> bool:
    """Whether a host is an address, or a name that the public name system does not give away."""
    try:
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        ipaddress.ip_address(name)
    except ValueError:
        return "." not in name or name.endswith(".localhost") or name == socket.gethostname().lower()
    return True


def _refusal(origin: str) -> ApiError:
    given = repr(origin)[1:-1]
    message = (
        f"The origin {given} is not allowed to use this server. To allow it, start the server with "
        f"--allowed-origins {given}."
        if given
        else "The Origin header is empty; expected an origin like https://chat.example.com, or no Origin header."
    )
    return ApiError(HTTPStatus.FORBIDDEN, message, code="origin_not_allowed")
