"""How many requests begin in one turn of the event loop: a few, each client in turn, and health probes at once.

Without this a turn takes as long as all requests that have come, some seconds for 2,500 refusals on a busy machine, and
a probe takes several turns: it is accepted, read and answered.  Knows nothing of what requests ask.
"""

import asyncio
from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from persimmon.server.http.request_record import header
from persimmon.server.round_robin import RoundRobin

BEGIN_PER_TURN = 4
"""Requests that begin in one turn, one or two milliseconds' work.

With 16 probes took three times as long; a turn that begins fewer costs the others nothing, because the next one follows
at once.
"""


class Pace:
    """Lets requests wait for their turn.

    Args:
        app: answers them.
        at_once: the paths that do not wait.
    """

    def __init__(self, app: ASGIApp, at_once: Collection[str]) -> None:
        self._app = app
        self._at_once = frozenset(at_once)
        # By Authorization header, so that a client with few requests does not wait behind one with many.
        self._waiting: RoundRobin[asyncio.Future[None]] = RoundRobin()
        self._begun = 0
        self._turning = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] == "http" and scope["path"] not in self._at_once:
            if self._begun < BEGIN_PER_TURN and not self._waiting:
                self._begin()
            else:
                await self._wait(header(scope, b"authorization") or "")
        await self._app(scope, receive, send)

    def _begin(self) -> None:
        self._begun += 1
        if not self._turning:
            self._turning = True
            asyncio.get_running_loop().call_soon(self._next_turn)

    async def _wait(self, client: str) -> None:
        place = asyncio.get_running_loop().create_future()
        self._waiting.put(client, place)
        await place

    def _next_turn(self) -> None:
        self._begun = 0
        while self._waiting and self._begun < BEGIN_PER_TURN:
            place = self._waiting.take()
            if not place.cancelled():
                self._begun += 1
                place.set_result(None)
        self._turning = bool(self._begun)
        if self._turning:
            asyncio.get_running_loop().call_soon(self._next_turn)
