"""Images from URLs: only of allowed hosts, never of private addresses, within limits on size, redirects and time."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trustme

from persimmon.server.http.errors import FetchError
from persimmon.server.http.transport import media_fetcher
from persimmon.server.http.transport.media_fetcher import MediaFetcher, is_public

pytestmark = pytest.mark.anyio

HOST = "images.test"
LIMIT = 1000
BODY = b"the bytes of an image"
CHUNK = b"100\r\n%s\r\n" % (b"x" * 256)

Answer = Callable[[str], bytes]
"""From the head of a request to an answer."""


@asynccontextmanager
async def server(answer: Answer, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A server on this machine for the length of a block; its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        writer.write(answer(head))
        await writer.drain()
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    async with listening:
        yield listening.sockets[0].getsockname()[1]


def ok(body: bytes = BODY, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def redirect(location: str) -> bytes:
    return ok(b"", "302 Found", f"Location: {location}")


def fetcher(*hosts: str, addresses: tuple[str, ...] = ("127.0.0.1",), **options: Any) -> MediaFetcher:
    """One for which every name is this machine, whose address it may connect to."""

    async def resolve(host: str, port: int) -> list[str]:
        return list(addresses)

    return MediaFetcher(hosts or (HOST,), LIMIT, resolve, options.pop("is_allowed", lambda address: True), **options)


async def test_a_url_of_an_allowed_host_is_fetched() -> None:
    heads: list[str] = []

    def answer(head: str) -> bytes:
        heads.append(head)
        return ok()

    async with server(answer) as port:
        assert await fetcher().fetch(f"http://{HOST}:{port}/a%20b.png?size=2") == BODY
        assert await fetcher().fetch(f"HTTP://{HOST.upper()}:{port}") == BODY
    first = heads[0].splitlines()
    assert first[0] == "GET /a%20b.png?size=2 HTTP/1.1"
    assert f"host: {HOST}:{port}" in [line.lower() for line in first]
    assert "accept-encoding: identity" in [line.lower() for line in first]


async def test_https_checks_the_certificate_for_the_name() -> None:
    authority = trustme.CA()
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)

    def tls(*names: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*names).configure_cert(context)
        return context

    async with server(lambda head: ok(), tls(HOST)) as port:
        assert await fetcher(tls=trusted).fetch(f"https://{HOST}:{port}/") == BODY
    async with server(lambda head: ok(), tls("other.test")) as port:
        with pytest.raises(FetchError, match="certificate"):
            await fetcher(tls=trusted).fetch(f"https://{HOST}:{port}/")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://other.test/", "has the host 'other.test', but this server fetches images only from images.test"),
        (f"http://sub.{HOST}/", "has the host 'sub.images.test'"),
        (f"http://{HOST}.other.test/", "has the host"),
        ("http://127.0.0.1/", "has the host '127.0.0.1'"),
        ("http://other.test#@images.test/", "has the host 'other.test'"),
        (f"http://user:word@{HOST}/", "has a user name or a password"),
        (f"ftp://{HOST}/", "has the scheme 'ftp'"),
        (f"http://{HOST}/\n", r"is not valid: .*[^.]$"),
        (f"http://{HOST}:99999/", "has the port 99999"),
        ("http:///a", "has the host ''"),
    ],
)
async def test_other_urls_are_refused_before_anything_is_connected(url: str, reason: str) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        raise AssertionError("it is looked up")

    with pytest.raises(FetchError, match=reason):
        await MediaFetcher([HOST], LIMIT, resolve).fetch(url)


@pytest.mark.parametrize("addresses", [("127.0.0.1",), ("93.184.215.14", "10.0.0.1"), ("::1",)])
async def test_a_name_with_a_private_address_is_refused(addresses: tuple[str, ...]) -> None:
    with pytest.raises(FetchError, match="of its URL is in a private network"):
        await fetcher(addresses=addresses, is_allowed=is_public).fetch(f"http://{HOST}/")


async def test_the_next_address_is_tried_where_one_does_not_answer() -> None:
    async with server(lambda head: ok()) as port:
        # Linux has all of 127.0.0.0/8, and the server listens on one address only.
        assert await fetcher(addresses=("127.0.0.2", "127.0.0.1")).fetch(f"http://{HOST}:{port}/") == BODY


async def test_a_name_without_an_address_is_an_error() -> None:
    with pytest.raises(FetchError, match="cannot be found"):
        await fetcher(addresses=()).fetch(f"http://{HOST}/")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("255.255.255.255", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.215.14", True),
        ("64:ff9b::a00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) == public


async def test_redirects_are_followed_to_allowed_hosts_only() -> None:
    other = "cdn.test"
    answers = {"/": "", "/moved": "/", "/cdn": "", "/away": "http://evil.test/"}

    def answer(head: str) -> bytes:
        path = head.split()[1]
        if path == "/cdn":
            return redirect(f"http://{other}:{port}/")
        return redirect(answers[path]) if answers[path] else ok()

    async with server(answer) as port:
        assert await fetcher().fetch(f"http://{HOST}:{port}/moved") == BODY
        assert await fetcher(HOST, other).fetch(f"http://{HOST}:{port}/cdn") == BODY
        for path, host in (("/cdn", other), ("/away", "evil.test")):
            with pytest.raises(FetchError, match=f"has the host '{host}'"):
                await fetcher().fetch(f"http://{HOST}:{port}{path}")


async def test_redirects_are_followed_three_times() -> None:
    async with server(lambda head: redirect("/again")) as port:
        with pytest.raises(FetchError, match="redirects more than 3 times"):
            await fetcher().fetch(f"http://{HOST}:{port}/")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (ok(b"", "404 Not Found"), "answers its URL with status 404"),
        (ok(b"x" * (LIMIT + 1)), "gives more than 1,000 bytes"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNK * 100,
            "gives more",
        ),
        (ok(BODY, "200 OK", "Content-Encoding: gzip"), "compressed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nshort", "cannot be fetched"),
        (b"nonsense\r\n\r\n", "cannot be fetched"),
    ],
)
async def test_what_is_no_whole_short_answer_is_an_error(answer: bytes, reason: str) -> None:
    async with server(lambda head: answer) as port:
        with pytest.raises(FetchError, match=reason):
            await fetcher().fetch(f"http://{HOST}:{port}/")


async def test_an_answer_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_fetcher, "SECONDS", 0.05)
    never = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await never.wait()
        writer.close()

    listening = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        with pytest.raises(FetchError, match=r"no whole answer within 0\.05 s"):
            await fetcher().fetch(f"http://{HOST}:{port}/")
        never.set()
