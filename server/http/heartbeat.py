"""What an API worker does every half second: it shows that its event loop turns, and logs a lack of descriptors."""

import asyncio
import logging
import os
import resource
import time
from collections.abc import Callable

from persimmon.server.vitals import Vitals

BEAT_SECONDS = 0.5

REPEAT_SECONDS = 30.0
"""How often a lack of descriptors that goes on is logged."""

logger = logging.getLogger(__name__)


async def beat(vitals: Vitals, worker: int) -> None:
    """Beats until it is cancelled.

    Args:
        vitals: where the heart beats.
        worker: this worker's number.
    """
    descriptors = DescriptorWatch()
    while True:
        vitals.beat_worker(worker)
        descriptors.look()
        await asyncio.sleep(BEAT_SECONDS)


class DescriptorWatch:
    """Logs that no file descriptor is left, which libuv hides: it accepts new connections and closes them at once.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._logged: float | None = None

    def look(self) -> None:
        """Tries to get a descriptor."""
        try:
            os.close(os.dup(2))
        except OSError as error:
            now = self._clock()
            if self._logged is None or now - self._logged >= REPEAT_SECONDS:
                self._logged = now
                limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
                logger.error(
                    "%s: closing new connections; this process is limited to %d open files and connections: raise the "
                    "limit (ulimit -n, LimitNOFILE=), start more --api-workers or let clients reuse connections",
                    error.strerror,
                    limit,
                )
