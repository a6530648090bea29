"""The API workers of one server: which of them this process is, and what they tell one another of their metrics.

Knows that there are snapshots, not what is in them.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

from persimmon.server.http.errors import ApiError

_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class WorkerPlace:
    """One API worker among those of its server.

    Attributes:
        index: its own number, from 0.
        count: how many there are.
        folder: a private one for their sockets; without other workers there are none.
        started: when the server started, in seconds since 1970.
        vitals: the file of the server's `Vitals`, in a private folder; None for none but its own.
    """

    index: int = 0
    count: int = 1
    folder: Path = Path()
    started: int = field(default_factory=lambda: int(time.time()))
    vitals: Path | None = None

    def socket(self, index: int) -> Path:
        """The unix socket on which a worker serves its snapshot."""
        return self.folder / f"api-{index}"


class Siblings:
    """Gathers a snapshot of each API worker, for answers that must not depend on who gives them.

    A worker writes its snapshot to every process that connects. So counting costs nothing except on request, and
    nothing is lost or counted twice.  The alternative, prometheus_client's files in shared memory, makes each
    observation three times as slow, and one is made for every token.

    Args:
        place: this worker's.
        snapshot: this worker's, now.
    """

    def __init__(self, place: WorkerPlace, snapshot: Callable[[], bytes]) -> None:
        self._place = place
        self._snapshot = snapshot

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Answers the other workers for the length of a block."""
        if self._place.count == 1:
            yield
            return
        async with await asyncio.start_unix_server(self._answer, self._place.socket(self._place.index)):
            yield

    async def snapshots(self) -> list[bytes]:
        """All workers' snapshots, in the order of their numbers; a worker that has not started yet has none.

        Raises:
            ApiError: a worker did not answer; figures without its own would be wrong.
        """
        asked = await asyncio.gather(*map(self._ask, range(self._place.count)))
        return [snapshot for snapshot in asked if snapshot]

    async def _answer(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):  # it asks no more
            writer.write(self._snapshot())
            writer.close()
            await writer.wait_closed()

    async def _ask(self, index: int) -> bytes:
        if index == self._place.index:
            return self._snapshot()
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                reader, writer = await asyncio.open_unix_connection(self._place.socket(index))
                with contextlib.closing(writer):
                    return await reader.read()
        except FileNotFoundError:
            return b""
        except (OSError, TimeoutError):
            raise ApiError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"API worker {index} of {self._place.count} did not send its metrics; please try again.",
                type="server_error",
                code="metrics_incomplete",
            ) from None
