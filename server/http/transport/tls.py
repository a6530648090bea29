"""HTTPS: the certificate, which may change while the server runs, and the socket that accepts connections.

asyncio's own server would wait a minute for each handshake, and close without a word on a client that speaks plain
HTTP.  Knows nothing of HTTP but the one answer that such a client gets.
"""

import asyncio
import contextlib
import logging
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from persimmon.server.config import Settings
from persimmon.server.http.errors import ApiError
from persimmon.server.http.transport.refusal import refusal
from persimmon.server.settings.section import SettingsError

logger = logging.getLogger(__name__)

_HANDSHAKE = b"\x16"
"""The first byte of every TLS connection: the type of a handshake record."""

_ACCEPT_AGAIN_SECONDS = 0.5
"""Where a connection cannot be accepted, for want of file descriptors for example."""

_CLOSE_SECONDS = 2.0
"""For a client to read why it is refused."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate chain and its private key, as they were in their files.

    Attributes:
        chain: PEM.
        key: PEM, without a password.
    """

    chain: bytes
    key: bytes

    @classmethod
    def read(cls, settings: Settings) -> "Certificate | None":
        """What the settings name; None where that is nothing.

        Raises:
            SettingsError: the files cannot be read, or do not belong together.
        """
        if settings.ssl_certfile is None or settings.ssl_keyfile is None:
            return None
        try:
            certificate = cls(settings.ssl_certfile.read_bytes(), settings.ssl_keyfile.read_bytes())
            certificate.context()
        except (OSError, ssl.SSLError) as error:
            raise SettingsError(
                f"--ssl-certfile {settings.ssl_certfile} with --ssl-keyfile {settings.ssl_keyfile} cannot be used: "
                f"{error.strerror or error}"
            ) from None
        return certificate

    def context(self) -> ssl.SSLContext:
        """What connections are served with.

        Raises:
            ssl.SSLError: certificate and key cannot be used, or not together.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["http/1.1"])
        with _in_memory(self.chain) as chain, _in_memory(self.key) as key:
            # An empty password, so that a key that needs one is an error and no question at the console.
            context.load_cert_chain(chain, key, password="")
        return context


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[Path]:
    """A file that is on no disk, for the length of a block: OpenSSL takes names of files only."""
    descriptor = os.memfd_create("persimmon-pem", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, content)
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


class TlsListener:
    """Accepts connections on a socket, and hands them over when their handshake is done.

    Args:
        listener: bound and listening; uvicorn closes it.
        make_protocol: of a connection.
        context: of new connections.
        handshake_seconds: from connecting to the end of the handshake.

    Attributes:
        context: may be replaced.
    """

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        context: ssl.SSLContext,
        handshake_seconds: float,
    ) -> None:
        self._listener = listener
        self._make_protocol = make_protocol
        self.context = context
        self._handshake_seconds = handshake_seconds
        self._loop = asyncio.get_running_loop()
        self._handshakes: set[asyncio.Task[None]] = set()
        listener.setblocking(False)
        self._accepting = self._loop.create_task(self._accept())

    def close(self) -> None:
        """Accepts no more, and ends handshakes; connections go on."""
        for task in (self._accepting, *self._handshakes):
            task.cancel()

    async def wait_closed(self) -> None:
        """Waits until nothing is accepted any more."""
        await asyncio.gather(self._accepting, *self._handshakes, return_exceptions=True)

    async def _accept(self) -> None:
        while True:
            try:
                client, _ = await self._loop.sock_accept(self._listener)
            except OSError as error:
                logger.error("cannot accept a connection: %s", error.strerror or error)
                await asyncio.sleep(_ACCEPT_AGAIN_SECONDS)
                continue
            task = self._loop.create_task(self._secure(client))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    async def _secure(self, client: socket.socket) -> None:
        deadline = self._loop.time() + self._handshake_seconds
        try:
            client.setblocking(False)
            async with asyncio.timeout_at(deadline):
                await self._readable(client)
            first = client.recv(1, socket.MSG_PEEK)
            if first == _HANDSHAKE:
                await self._loop.connect_accepted_socket(
                    self._make_protocol,
                    client,
                    ssl=self.context,
                    ssl_handshake_timeout=max(0.001, deadline - self._loop.time()),
                )
            elif first:
                await self._loop.connect_accepted_socket(_PlainRefusal, client)
            else:
                client.close()
        except (OSError, TimeoutError) as error:  # an SSLError is an OSError
            client.close()
            logger.debug("a TLS handshake failed: %s", error)
        except BaseException:
            client.close()
            raise

    async def _readable(self, client: socket.socket) -> None:
        """Waits until a client has sent something, or has gone."""
        readable = asyncio.Event()
        self._loop.add_reader(client, readable.set)
        try:
            await readable.wait()
        finally:
            self._loop.remove_reader(client)


class _PlainRefusal(asyncio.Protocol):
    """Tells a client that speaks plain HTTP to a port for HTTPS what to do."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called when it has connected."""
        error = ApiError(
            HTTPStatus.BAD_REQUEST,
            "This port speaks HTTPS, but the request was sent in plain HTTP. Use https:// in the address.",
            code="https_required",
        )
        transport.write(refusal(error))
        # Closed while there are bytes to read, the connection would be reset, and the answer lost.
        transport.write_eof()
        asyncio.get_running_loop().call_later(_CLOSE_SECONDS, transport.close)
