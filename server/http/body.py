"""Reads a request's body: no longer than is allowed, and no slower.

Counts what has come, not what the client said would come, so it holds for chunked bodies too.
"""

import asyncio
from http import HTTPStatus

from starlette.requests import Request

from server.http.errors import ApiError

SLOWEST_BYTES_PER_SECOND = 16 * 1024
"""Bodies that come more slowly are given up: a phone far from its mast sends faster."""


class BodyReader:
    """Reads bodies.

    Args:
        most: bytes of one body.
        patience: seconds that it may stand still.
    """

    def __init__(self, most: int, patience: float) -> None:
        self._most = most
        self._patience = patience

    async def read(self, request: Request) -> bytes:
        """The whole body.

        Raises:
            ApiError: a 413 for one that is too long, before the rest of it is read; a 408 for one that does not come.
            ClientDisconnect: the client went away.
        """
        if int(request.headers.get("content-length", "0")) > self._most:
            raise self._too_long()
        body = bytearray()
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout_at(started + self._patience) as deadline:
                async for part in request.stream():
                    body += part
                    if len(body) > self._most:
                        raise self._too_long()
                    deadline.reschedule(started + self._patience + len(body) / SLOWEST_BYTES_PER_SECOND)
        except TimeoutError:
            raise ApiError(
                HTTPStatus.REQUEST_TIMEOUT,
                f"The body did not come in time: {len(body)} bytes in {loop.time() - started:.0f} s. Needed are "
                f"{SLOWEST_BYTES_PER_SECOND} bytes a second, and no pause longer than {self._patience:g} s.",
                code="request_timeout",
                headers={"Connection": "close"},
            ) from None
        return bytes(body)

    def _too_long(self) -> ApiError:
        return ApiError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The body is longer than {self._most} bytes.",
            code="request_too_large",
        )
