"""Reads a request's body: JSON, no longer than is allowed, no slower, and all bodies together within bounds.

Counts what has come, not what the client said would come, so it holds for chunked and packed bodies too.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import TypeVar

from starlette.requests import Request

from persimmon.server.http.errors import ApiError, overloaded
from persimmon.server.http.transport.content import Gunzip, check_is_json, unpacker
from persimmon.server.settings.engine import BODIES_TOGETHER

MIN_BYTES_PER_SECOND = 16 * 1024
"""Bodies that come more slowly are given up: a phone far from its mast sends faster."""

FREE_BYTES = 64 * 1024
"""Of each body that do not count: a few clients that send long ones slowly must not keep short ones out."""

BYTES_AT_ONCE = 64 * 1024
"""Of a body that is parsed in the event loop, in about a millisecond."""

_RETRY_SECONDS = 2

_Parsed = TypeVar("_Parsed")


class BodyReader:
    """Reads bodies.

    Args:
        max_bytes: of one body, unpacked.
        max_pause: seconds that it may stand still.
    """

    def __init__(self, max_bytes: int, max_pause: float) -> None:
        self._max_bytes = max_bytes
        self._max_pause = max_pause
        self._room = BODIES_TOGETHER * max_bytes
        self._parsing = asyncio.Semaphore(1)

    async def read(self, request: Request, parse: Callable[[bytes], _Parsed]) -> _Parsed:
        """What is in a body, unpacked.

        A long one is parsed in a thread, so that the event loop goes on, and keeps its room until then.

        Args:
            request: that it belongs to.
            parse: makes something of the whole of it.

        Raises:
            ApiError: a 415 for one that is not JSON or is packed in an unknown way; a 413 for one that is too long, or
                a 429 if the server has no room for it now, both before the rest of it is read; a 408 for one that does
                not come; a 400 for one that is not packed as it says.
            ClientDisconnect: the client went away.
        """
        check_is_json(request.headers)
        gunzip = unpacker(request.headers)
        announced = int(request.headers.get("content-length", "0"))
        if announced > self._max_bytes:
            raise self._too_long()
        if announced - FREE_BYTES > self._room:
            raise self._no_room()
        with self._received() as body:
            await self._receive(request, body, gunzip)
            if len(body) <= BYTES_AT_ONCE:
                return parse(bytes(body))
            # One at a time: a parsed body takes many times its length.
            async with self._parsing:
                return await asyncio.to_thread(parse, bytes(body))

    async def _receive(self, request: Request, body: bytearray, gunzip: Gunzip | None) -> None:
        received = 0
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout_at(started + self._max_pause) as deadline:
                async for part in request.stream():
                    received += len(part)
                    if gunzip is None:
                        self._add(body, part)
                    else:
                        for piece in gunzip.feed(part):
                            self._add(body, piece)
                            await asyncio.sleep(0)  # others have their turn
                    deadline.reschedule(started + self._max_pause + received / MIN_BYTES_PER_SECOND)
        except TimeoutError:
            raise ApiError(
                HTTPStatus.REQUEST_TIMEOUT,
                f"The body arrived too slowly: {received} bytes in {loop.time() - started:.0f} s. Expected at least "
                f"{MIN_BYTES_PER_SECOND} bytes per second and no pause longer than {self._max_pause:g} s.",
                code="request_timeout",
                headers={"Connection": "close"},
            ) from None
        if gunzip is not None:
            self._add(body, gunzip.end())

    @contextlib.contextmanager
    def _received(self) -> Iterator[bytearray]:
        """A body, whose room is free again at the end of the block."""
        body = bytearray()
        try:
            yield body
        finally:
            self._room += _counted(len(body))

    def _add(self, body: bytearray, part: bytes) -> None:
        length = len(body) + len(part)
        if length > self._max_bytes:
            raise self._too_long()
        more = _counted(length) - _counted(len(body))
        if more > self._room:
            raise self._no_room()
        self._room -= more
        body += part

    def _too_long(self) -> ApiError:
        return ApiError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The body is longer than {self._max_bytes} bytes.",
            code="request_too_large",
        )

    def _no_room(self) -> ApiError:
        return overloaded("The server has no memory for another long body", _RETRY_SECONDS)


def _counted(length: int) -> int:
    return max(0, length - FREE_BYTES)
