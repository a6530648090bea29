"""Who is let in: work while the server serves and has room for it, and nothing new while it stops.

Refuses in microseconds, before a body is read.  Knows how many sequences and prompt tokens there are, not what is in
them.
"""

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from persimmon.server.config import Settings
from persimmon.server.engine.load import Load
from persimmon.server.http.errors import ApiError, overloaded, shutting_down
from persimmon.server.http.request_record import record_of

MAX_RETRY_SECONDS = 30
"""Maximum Retry-After of a refused request."""

CHARACTERS_PER_TOKEN = 4
"""Of English text, about; it stands for a prompt's length until its tokens are counted."""

BATCHES_IN_FLIGHT = 5
"""One full batch runs and four wait: who is let in last waits for about four answers."""

STEPS_QUEUED = 256
"""Prompt tokens that may wait, in full steps.  With the largest model and GPU known here that is some ten seconds."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes on.

    Attributes:
        sequences: most in the server at once, those that run included; None for any number.
        prompt_tokens: most that wait to be computed; None for any number.
        step_timeout: seconds after which an engine that ends no step counts as hung; None for the device's default.
        ping_interval: seconds after which a quiet stream of events gets a comment; 0 for never.
    """

    sequences: int | None = None
    prompt_tokens: int | None = None
    step_timeout: float | None = None
    ping_interval: float = 0.0

    @classmethod
    def of(cls, settings: Settings) -> "Limits":
        """What the settings say, or what follows from how much the engines do at once."""
        engines = settings.data_parallel_size
        return cls(
            sequences=settings.max_num_queued_reqs or BATCHES_IN_FLIGHT * settings.max_num_seqs * engines,
            prompt_tokens=settings.max_num_queued_tokens or STEPS_QUEUED * settings.max_num_batched_tokens * engines,
            step_timeout=settings.step_timeout,
            ping_interval=settings.sse_ping_interval,
        )


class Gate:
    """The gate of one API worker; the bounds are those of all workers together.

    Args:
        load: what this worker wants of the engine, and the others.
        limits: of the server.
        clients: how many keys there are, counted at each API worker; 0 where the server has none.

    Attributes:
        draining: whether the server stops, so that nothing new is let in.
    """

    def __init__(self, load: Load, limits: Limits | None = None, clients: Callable[[], int] = lambda: 0) -> None:
        self.load = load
        self.limits = limits or Limits()
        self._clients = clients
        self.draining = False
        self._open = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def check(self, sequences: int = 1, prompt_tokens: int = 0, owner: str = "") -> None:
        """Raises the ApiError for work that the server has no room for.

        Work that is larger than all the room there is has some while nearly nothing waits: it would never have any
        otherwise.  A server that others have filled takes a little more from each key: half of the room again, divided
        among the keys.

        Args:
            sequences: that it asks for, as far as known.
            prompt_tokens: that it brings, as far as known.
            owner: the name of its key; empty without one.
        """
        total, own, limits = self.load.total, self.load.of(owner), self.limits
        if not (
            _has_room(total.sequences, sequences, limits.sequences)
            or self._has_own_room(owner, own.sequences + sequences, limits.sequences, 1)
        ):
            raise overloaded(
                f"The server is full: it has {total.sequences} of at most {limits.sequences} sequences, and this "
                f"request asks for {sequences}",
                self.retry_after,
            )
        if not (
            _has_room(total.prompt_tokens, prompt_tokens, limits.prompt_tokens)
            or self._has_own_room(
                owner,
                own.prompt_tokens + prompt_tokens,
                limits.prompt_tokens,
                (limits.prompt_tokens or 0) // STEPS_QUEUED,
            )
        ):
            raise overloaded(
                f"The server is full: {total.prompt_tokens} prompt tokens of at most {limits.prompt_tokens} are "
                f"waiting, and this request adds about {prompt_tokens}",
                self.retry_after,
            )

    def _has_own_room(self, owner: str, wanted: int, most: int | None, least: int) -> bool:
        """Whether a client may have this much though others have filled the server.

        Args:
            owner: the name of its key; empty without one.
            wanted: what it would have with the new work.
            most: the bound of all together.
            least: what it may have however many clients there are.
        """
        if not owner or most is None:
            return False
        return wanted <= max(least, most // (2 * max(1, self._clients())))

    @contextlib.contextmanager
    def reserved(self, sequences: int, prompt_tokens: int, owner: str = "") -> Iterator[None]:
        """Keeps room for work that is being tokenized, for the length of a block.

        Raises:
            ApiError: there is none.
        """
        self.check(sequences, prompt_tokens, owner)
        self.load.add(sequences, prompt_tokens, owner)
        try:
            yield
        finally:
            self.load.add(-sequences, -prompt_tokens, owner)

    @property
    def retry_after(self) -> int:
        """Whole seconds after which a refused client may find room: by then those inside have been answered."""
        return max(1, math.ceil(min(self.load.seconds_to_drain, MAX_RETRY_SECONDS)))

    def check_open(self) -> None:
        """Raises the ApiError of work that comes while the server stops."""
        if self.draining:
            raise shutting_down()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """One request is in the server for the length of a block."""
        self._open += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._empty.set()

    async def wait_until_empty(self) -> None:
        """Returns when no request is in the server."""
        await self._empty.wait()


def _has_room(present: int, more: int, most: int | None) -> bool:
    if most is None or present + more <= most:
        return True
    return more > most and present <= most // BATCHES_IN_FLIGHT


class GateKeeper:
    """Refuses requests that the gate does not let in, and closes connections while the server stops.

    Args:
        app: answers the others.
        gate: the worker's.
        engine_routes: by path, the routes of the endpoints that ask something of the engine.
    """

    def __init__(self, app: ASGIApp, gate: Gate, engine_routes: Mapping[str, BaseRoute]) -> None:
        self._app = app
        self._gate = gate
        self._engine_routes = engine_routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self._gate.draining:
                # The client's next request is for another server.
                message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
            await send(message)

        if scope["method"] not in ("POST", "PUT"):
            await self._app(scope, receive, closing)
            return
        route = self._engine_routes.get(scope["path"])
        try:
            self._gate.check_open()
            if route is not None:
                self._gate.check(owner=record_of(scope).owner)
        except ApiError as error:
            if route is not None:
                scope["route"] = route  # as the router would set it: metrics count by route
            await error.response()(scope, receive, closing)
            return
        with self._gate.entered():
            await self._app(scope, receive, closing)
