"""What Ray's HTTP proxies do for the server: name a prompt's beginnings for the router, and end broken answers.

Ray asks for `middlewares` where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it.  A proxy serves every application
of the cluster, so all but completions pass untouched.
"""

from http import HTTPStatus

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from persimmon.server.http.errors import ApiError
from persimmon.server.http.transport.sse import event
from persimmon.server.ray.prefixes import prefix_keys

PATHS = ("/v1/completions", "/v1/chat/completions")
"""The ends of the paths of completions, under whatever prefix the application is served."""

SESSION_HEADER = "x-session-id"
"""Where Ray's router reads what it calls a session; see `request_router`."""

MAX_READ_BYTES = 1 << 20
"""A body is read this far before a replica is chosen; a longer one goes wherever there is the least to do."""

_RETRY_AFTER_SECONDS = 5


def middlewares() -> list[Middleware]:
    """What Ray puts around its proxy."""
    return [Middleware(WholeAnswers), Middleware(PrefixHeader)]


class _Body(msgspec.Struct):
    """The parts of a completion's body that decide what is in the cache, as their JSON."""

    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()
    cache_salt: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder(_Body).decode


def session_id(path: str, body: bytes) -> str:
    """The keys of a completion's prompt, separated by commas; empty if it cannot be read, or is too short to matter."""
    try:
        parts = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # the replica says what is wrong with it
        return ""
    # A chat template puts the tools first, and each kind of request has its own beginning.
    salt = b"\0".join((path.encode(), bytes(parts.cache_salt), bytes(parts.tools)))
    return ",".join(prefix_keys(bytes(parts.messages) or bytes(parts.prompt), salt))


class PrefixHeader:
    """Reads a completion's body first, and names the beginnings of its prompt in a header.

    A session id that the client has sent stays.

    Args:
        app: Ray's proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if not _is_completion(scope) or SESSION_HEADER in Headers(scope=scope):
            await self._app(scope, receive, send)
            return
        read, body = [], bytearray()
        while len(body) <= MAX_READ_BYTES:
            message = await receive()
            read.append(message)
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        if read[-1]["type"] == "http.request" and not read[-1].get("more_body", False):
            path = next(path for path in PATHS if scope["path"].endswith(path))
            if keys := session_id(path, bytes(body)):
                MutableHeaders(scope=scope).append(SESSION_HEADER, keys)
        read.reverse()

        async def receive_again() -> Message:
            return read.pop() if read else await receive()

        await self._app(scope, receive_again, send)


class WholeAnswers:
    """Ends an answer that its replica cannot end, because it has died.

    Ray closes the connection in the middle of a stream, and answers 500 without a word before it.  Instead a stream
    ends with an event of OpenAI's error shape, and another answer is a 503, which clients send again.

    Args:
        app: Ray's proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if not _is_completion(scope):
            await self._app(scope, receive, send)
            return
        answer = _Answer(receive, send)
        await self._app(scope, answer.receive, answer.send)
        if answer.complete or answer.client_left:
            return
        error = ApiError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "The replica that computed the answer has ended. Please send the request again.",
            type="server_error",
            code="replica_dead",
            retry_after=_RETRY_AFTER_SECONDS,
        )
        if not answer.started:
            await error.response()(scope, receive, send)
        elif answer.is_stream:
            await send({"type": "http.response.body", "body": event(error.body), "more_body": False})


class _Answer:
    """How far an answer is.

    Attributes:
        started: whether its status has been sent.
        is_stream: whether it consists of events.
        complete: whether its end has been sent.
        client_left: whether the client is gone.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self.started = False
        self.is_stream = False
        self.complete = False
        self.client_left = False

    async def receive(self) -> Message:
        """ASGI."""
        message = await self._receive()
        self.client_left = self.client_left or message["type"] == "http.disconnect"
        return message

    async def send(self, message: Message) -> None:
        """ASGI."""
        if message["type"] == "http.response.start":
            self.started = True
            self.is_stream = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
        elif message["type"] == "http.response.body":
            self.complete = not message.get("more_body", False)
        await self._send(message)


def _is_completion(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["method"] == "POST" and str(scope["path"]).endswith(PATHS)
