"""Fetches what clients' URLs name, from allowed hosts only and never from this machine or its private networks.

Knows HTTP, names and addresses; nothing of images.
"""

import asyncio
import ipaddress
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection
from importlib.metadata import version

import httpx

from persimmon.server.http.errors import FetchError

MAX_REDIRECTS = 3
SECONDS = 10.0
"""For one URL, redirects included."""

_CONNECTIONS = 64

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""From a host and a port to IP addresses; an OSError for a host that has none."""


class MediaFetcher:
    """Fetches URLs.

    A host's addresses are looked up once, all of them must be public, and these are connected to: a name cannot mean
    another address when it is used than when it was checked.  Proxies of the environment are not used.

    Args:
        hosts: names in lower case that URLs may have, exactly so.
        max_bytes: of a body.
        resolve: looks hosts up.
        is_allowed: whether an address may be connected to.
        tls: what certificates are checked against; None for the environment's authorities.
    """

    def __init__(
        self,
        hosts: Collection[str],
        max_bytes: int,
        resolve: Resolve | None = None,
        is_allowed: Callable[[str], bool] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._hosts = frozenset(hosts)
        self._max_bytes = max_bytes
        self._resolve = resolve or _addresses
        self._is_allowed = is_allowed or is_public
        # It logs every URL, which may hold a signature.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        # A connection is to an address and for a name, so none is kept for the next URL.
        self._client = httpx.AsyncClient(
            verify=tls or httpx.create_ssl_context(),
            trust_env=False,
            timeout=2 * SECONDS,  # `fetch` has its own for all of a URL
            limits=httpx.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=0),
        )

    async def fetch(self, url: str) -> bytes:
        """The body that a URL names.

        Args:
            url: http or https.

        Raises:
            FetchError: the host is not allowed, the answer is not 200, longer than allowed or too slow, or there is
                none.
        """
        try:
            async with asyncio.timeout(SECONDS):
                return await self._follow(_parsed(url))
        except TimeoutError:
            raise FetchError(f"its URL gave no whole answer within {SECONDS:g} s") from None
        except httpx.HTTPError as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise FetchError(f"its URL cannot be fetched: {reason}") from None

    async def _follow(self, url: httpx.URL) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            response = await self._send(url)
            try:
                location = response.headers.get("location")
                if not response.has_redirect_location or location is None:
                    return await self._body(response, url)
            finally:
                await response.aclose()
            try:
                url = url.join(location)
            except (httpx.InvalidURL, ValueError):
                raise FetchError(f"its URL redirects to {location[:100]!r}, which is not a valid URL") from None
        raise FetchError(f"its URL redirects more than {MAX_REDIRECTS} times")

    async def _send(self, url: httpx.URL) -> httpx.Response:
        """The beginning of an answer, from the first address of the host that can be connected to."""
        host, addresses = await self._checked(url)
        for number, address in enumerate(addresses, 1):
            request = self._client.build_request(
                "GET",
                url.copy_with(host=address),
                headers={
                    "Host": url.netloc.decode("ascii"),
                    "Accept": "image/*",
                    "Accept-Encoding": "identity",
                    "User-Agent": f"persimmon-server/{version('persimmon-server')}",
                },
                extensions={"sni_hostname": host},
            )
            try:
                return await self._client.send(request, stream=True)
            except httpx.ConnectError:
                if number == len(addresses):
                    raise
        raise FetchError(f"the host {host!r} of its URL cannot be found")

    async def _checked(self, url: httpx.URL) -> tuple[str, list[str]]:
        """The host of a URL and its addresses, all of which may be connected to."""
        host = url.raw_host.decode("ascii").lower()
        if url.scheme not in ("http", "https"):
            raise FetchError(f"its URL has the scheme {url.scheme[:20]!r}; expected http or https")
        if url.userinfo:
            raise FetchError("its URL has a user name or a password; send one without")
        if host not in self._hosts:
            raise FetchError(
                f"its URL has the host {host[:100]!r}, but this server fetches images only from "
                f"{', '.join(sorted(self._hosts))} (--allowed-media-domains); send a data: URL instead"
            )
        port = url.port or (443 if url.scheme == "https" else 80)
        if port > 65535:
            raise FetchError(f"its URL has the port {port}; expected one up to 65535")
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError):
            addresses = []
        if not all(map(self._is_allowed, addresses)):
            raise FetchError(f"the host {host!r} of its URL is in a private network, from which nothing is fetched")
        return host, addresses

    async def _body(self, response: httpx.Response, url: httpx.URL) -> bytes:
        if response.status_code != httpx.codes.OK:
            raise FetchError(f"the host {url.host!r} answers its URL with status {response.status_code}")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise FetchError(f"the host {url.host!r} answers its URL with a compressed body, which is not read")
        announced = response.headers.get("content-length", "")
        body = bytearray()
        if not (announced.isdecimal() and int(announced) > self._max_bytes):
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > self._max_bytes:
                    break
            else:
                return bytes(body)
        raise FetchError(f"its URL gives more than {self._max_bytes:,} bytes")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also where it is written into an IPv6 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        nat64 = ipaddress.IPv4Address(ip.packed[-4:]) if ip in _NAT64 else None
        inner = ip.ipv4_mapped or ip.sixtofour or nat64
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def _parsed(url: str) -> httpx.URL:
    try:
        return httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise FetchError(f"its URL is not valid: {' '.join(str(error).split())[:200].rstrip('.')}") from None


async def _addresses(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))
