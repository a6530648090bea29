"""Watches a connection whose client will send no more: it waits for its answer, or it is gone.

Only writing shows which: the system of a client that is gone answers with a reset.
"""

import asyncio
import socket
from collections.abc import Callable

_TCP_CLOSE = 7
"""The state of a socket whose peer has reset the connection (linux/tcp_states.h)."""

_FIRST_PROBE_SECONDS, _MAX_PROBE_SECONDS = 0.02, 5.0
"""Time between two looks at a half-closed connection.  It doubles, so that the nine probes last for ten seconds."""


class HalfClosedWatch:
    """Aborts a half-closed connection when its client has reset it.

    Args:
        loop: that runs.
        transport: of the connection.
        probe: sends a byte of the answer, where one is known; called before each next look.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, probe: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._transport = transport
        self._probe = probe
        probe()
        self._timer = loop.call_later(_FIRST_PROBE_SECONDS, self._look, _FIRST_PROBE_SECONDS)

    def stop(self) -> None:
        """Looks no more."""
        self._timer.cancel()

    def _look(self, seconds: float) -> None:
        if self._transport.is_closing():
            return
        connection = self._transport.get_extra_info("socket")
        # The loop does not watch for errors while it does not read.
        if connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE:
            self._transport.abort()
            return
        self._probe()
        seconds = min(2 * seconds, _MAX_PROBE_SECONDS)
        self._timer = self._loop.call_later(seconds, self._look, seconds)
