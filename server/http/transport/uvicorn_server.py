"""uvicorn's server with this project's connections; the one file that rests on undocumented parts of uvicorn.

uvicorn runs the application's lifespan, accepts connections, keeps the Date header, and waits for connections and tasks
when it ends.  Releases may change what is used here: the protocol factory and its arguments, `ServerState`, `startup`,
`servers`, `lifespan.state`, `loaded_app` and `capture_signals`.  So pyproject.toml bounds the version, and
tests/compat/test_uvicorn.py runs the tests of connections with the oldest release allowed and with the newest there is.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.server import ServerState

from persimmon.server.http.transport.connection import Connection
from persimmon.server.http.transport.tls import TlsListener

FINAL_ERROR_SECONDS = 2
"""For the errors of requests that did not end in time to reach clients that read."""


class HttpServer(uvicorn.Server):
    """Serves an application; `serve` runs until `should_exit` is set.

    Signals are not handled: uvicorn would raise SIGTERM again at the end, and a drained worker has ended well.

    Args:
        app: the application.
        header_seconds: time for a client's headers, and for a TLS handshake.
        send_seconds: time in which a client must take what waits for it.
        keep_alive_seconds: time that a connection without requests stays open.
        tls: of HTTPS connections; None for plain HTTP.
        trusted_proxies: addresses whose X-Forwarded headers count, separated by commas.
        lifespan: whether the application has one.

    Attributes:
        accepting: set when connections are accepted.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        header_seconds: float,
        send_seconds: float,
        keep_alive_seconds: float,
        tls: ssl.SSLContext | None = None,
        trusted_proxies: str = "",
        lifespan: bool = True,
    ) -> None:
        self._header_seconds = header_seconds
        self._send_seconds = send_seconds
        self._keep_alive_seconds = keep_alive_seconds
        self._tls = tls
        self._tls_listeners: list[TlsListener] = []
        self.accepting = asyncio.Event()
        super().__init__(
            uvicorn.Config(
                app,
                http=self._connection,  # type: ignore[arg-type]  # uvicorn only calls it
                ws="none",
                lifespan="on" if lifespan else "off",
                access_log=False,
                log_config=None,
                server_header=False,
                forwarded_allow_ips=trusted_proxies,
                timeout_graceful_shutdown=FINAL_ERROR_SECONDS,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Runs the application's startup and accepts connections; uvicorn calls it."""
        if self._tls is None:
            await super().startup(sockets)
        else:
            await super().startup([])
            for own in sockets or []:
                self._tls_listeners.append(
                    TlsListener(
                        listener=own,
                        make_protocol=self._tls_connection,
                        context=self._tls,
                        handshake_seconds=self._header_seconds,
                    )
                )
            self.servers += self._tls_listeners  # type: ignore[arg-type]  # uvicorn closes them when it ends
        self.accepting.set()

    def replace_tls(self, tls: ssl.SSLContext) -> None:
        """Serves new connections with another certificate."""
        self._tls = tls
        for listener in self._tls_listeners:
            listener.context = tls

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the process; uvicorn calls it."""
        yield

    def _connection(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> Connection:
        """A connection; the arguments' names are uvicorn's."""
        return Connection(
            config.loaded_app,
            server_state,
            app_state,
            header_seconds=self._header_seconds,
            send_seconds=self._send_seconds,
            keep_alive_seconds=self._keep_alive_seconds,
        )

    def _tls_connection(self) -> Connection:
        return self._connection(self.config, self.server_state, self.lifespan.state)
