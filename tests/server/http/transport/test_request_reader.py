"""What is a request and what is not, without a network."""

import itertools
import re
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persimmon.server.http.errors import ApiError
from persimmon.server.http.transport.request_reader import (
    MAX_CHUNK_OVERHEAD,
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    RequestHead,
    RequestReader,
)

HEAD = b"POST /path HTTP/1.1\r\nHost: server\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA\r\n"
WEBSOCKET = b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
TLS = b"Connection: Upgrade\r\nUpgrade: TLS/1.2\r\n"


@dataclass
class Read:
    """Every request that was read: its head, its body, and whether it came to its end."""

    heads: list[RequestHead] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    ended: int = 0

    def on_head(self, head: RequestHead) -> None:
        self.heads.append(head)
        self.bodies.append(b"")

    def on_body(self, body: bytes) -> None:
        self.bodies[-1] += body

    def on_end(self) -> None:
        self.ended += 1


def read(*parts: bytes) -> Read:
    """What is read of a connection on which this came."""
    found = Read()
    reader = RequestReader(found.on_head, found.on_body, found.on_end)
    for part in parts:
        reader.feed(part)
    return found


def refusal(*parts: bytes) -> ApiError:
    """What becomes of bytes that are not a request."""
    with pytest.raises(ApiError) as raised:
        read(*parts)
    return raised.value


def test_a_request_is_read_to_its_end() -> None:
    found = read(HEAD + b"X-Own: Value\r\nContent-Length: 3\r\n\r\nabc")
    (head,) = found.heads
    assert (head.method, head.path, head.query, head.http_version) == ("POST", b"/path", b"", "1.1")
    assert head.headers == [(b"host", b"server"), (b"x-own", b"Value"), (b"content-length", b"3")]
    assert (head.keep_alive, head.expects_continue) == (True, False)
    assert (found.bodies, found.ended) == ([b"abc"], 1)


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"/a%20b?c=d&e", "/a b", b"c=d&e"),
        (b"http://server:80/a?b", "/a", b"b"),
        (b"https://server", "/", b""),
        (b"http://server?b", "/", b"b"),
        (b"//a", "//a", b""),
        (b"*", "*", b""),
        (b"/a#b?c", "/a", b""),
    ],
)
def test_a_target_is_a_path_with_or_without_its_origin(target: bytes, path: str, query: bytes) -> None:
    (head,) = read(b"OPTIONS %b HTTP/1.1\r\nHost: server\r\n\r\n" % target).heads
    assert (head.decoded_path, head.query) == (path, query)


REQUESTS = {
    "length": HEAD + b"Content-Length: 3\r\n\r\nabc",
    "chunks": CHUNKED + b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\n",
    "extensions and trailers": CHUNKED + b'3;name="value"\r\nabc\r\n0\r\nX-Trailer: t\r\n\r\n',
    "h2c": HEAD + H2C + b"Content-Length: 3\r\n\r\nabc",
    "h2c, chunked": HEAD + H2C + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "websocket": HEAD + WEBSOCKET + b"Content-Length: 3\r\n\r\nabc",
    "TLS": HEAD + TLS + b"Content-Length: 3\r\n\r\nabc",
    "HTTP/1.0": b"POST /path HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 3\r\n\r\nabc",
    "empty lines before it": b"\r\n\r\n" + HEAD + b"Content-Length: 3\r\n\r\nabc",
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
@given(cuts=st.lists(st.integers(0, 500), max_size=4))
def test_requests_are_the_same_in_whatever_pieces_they_come(request_: bytes, cuts: list[int]) -> None:
    sent = request_ * 2 + b"GET / HTTP/1.1\r\nHost: server\r\n" + H2C + b"\r\n" + request_
    places = sorted({0, len(sent), *(cut % len(sent) for cut in cuts)})
    found = read(*(sent[begin:end] for begin, end in itertools.pairwise(places)))
    assert found.bodies == [b"abc", b"abc", b"", b"abc"]
    assert found.ended == 4
    assert all(head.keep_alive for head in found.heads)
    assert [head.path for head in found.heads] == [b"/path", b"/path", b"/", b"/path"]
    # Trailers are not headers.
    assert b"x-trailer" not in {name for head in found.heads for name, _ in head.headers}


def test_an_upgrade_offer_with_connection_close_is_the_last_request() -> None:
    offer = HEAD + H2C.replace(b"Upgrade,", b"Upgrade, close,") + b"Content-Length: 3\r\n\r\nabc"
    assert [head.keep_alive for head in read(offer).heads] == [False]
    with pytest.raises(ApiError):
        read(offer + HEAD + b"\r\n")


NOT_HTTP = {
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/0.9 by name": b"GET / HTTP/0.9\r\n\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\nHost: server\r\n\r\n",
    "HTTP/2": b"GET / HTTP/2.0\r\nHost: server\r\n\r\n",
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01",
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    "two Hosts in HTTP/1.0": b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n",
    "a Host that is a URL": b"GET / HTTP/1.1\r\nHost: http://a/\r\n\r\n",
    "a Host with a user": b"GET / HTTP/1.1\r\nHost: user@a\r\n\r\n",
    "a Host with a space": b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    "a Host with a comma and a space": b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n",
    "a Host with a word for a port": b"GET / HTTP/1.1\r\nHost: a:http\r\n\r\n",
    "CONNECT": b"CONNECT server:443 HTTP/1.1\r\nHost: server\r\n\r\n",
    "unknown method": b"BREW / HTTP/1.1\r\nHost: server\r\n\r\n",
    "relative address": b"GET path HTTP/1.1\r\nHost: server\r\n\r\n",
    "space in the address": b"GET /a b HTTP/1.1\r\nHost: server\r\n\r\n",
    "gzip, chunked": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "gzip and chunked": HEAD + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked, gzip": HEAD + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "chunked twice": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "identity": HEAD + b"Transfer-Encoding: identity\r\n\r\n",
    "chunked in HTTP/1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "length and chunked": HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "the same length twice": HEAD + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "a list of lengths": HEAD + b"Content-Length: 3, 3\r\n\r\nabc",
    "+3": HEAD + b"Content-Length: +3\r\n\r\nabc",
    "-3": HEAD + b"Content-Length: -3\r\n\r\nabc",
    "0x3": HEAD + b"Content-Length: 0x3\r\n\r\nabc",
    "1_0": HEAD + b"Content-Length: 1_0\r\n\r\n0123456789",
    "no length": HEAD + b"Content-Length: \r\n\r\n",
    "a length beyond all numbers": HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n",
    "space before a colon": HEAD + b"Content-Length : 3\r\n\r\nabc",
    "folded header": HEAD + b"X-Own: a\r\n b\r\n\r\n",
    "space before the first header": b"GET / HTTP/1.1\r\n Host: server\r\n\r\n",
    "LF for CRLF": b"GET / HTTP/1.1\nHost: server\n\n",
    "LF after a header": b"GET / HTTP/1.1\r\nHost: server\nX-Own: a\r\n\r\n",
    "CR in a header": HEAD + b"X-Own: a\rb\r\n\r\n",
    "NUL in a value": HEAD + b"X-Own: a\0b\r\n\r\n",
    "NUL in a name": HEAD + b"X-\0Own: a\r\n\r\n",
    "header without a name": HEAD + b": a\r\n\r\n",
    "header without a colon": HEAD + b"X-Own\r\n\r\n",
    "chunk size that is not a number": CHUNKED + b"zz\r\nabc\r\n0\r\n\r\n",
    "chunk size beyond all numbers": CHUNKED + b"ffffffffffffffffffff\r\nabc\r\n0\r\n\r\n",
    "chunk longer than its size": CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n",
    "LF after a chunk size": CHUNKED + b"3\nabc\r\n0\r\n\r\n",
    "long chunk extension": CHUNKED + b"3;" + b"a" * (2 * MAX_CHUNK_OVERHEAD) + b"\r\nabc\r\n0\r\n\r\n",
    "endless chunk extension": CHUNKED + b"3;" + b"a" * (MAX_CHUNK_OVERHEAD + 100),
    "many chunk extensions": CHUNKED + b"1;abcdefghijklmnopqrstuvwxyz\r\na\r\n" * MAX_CHUNK_OVERHEAD,
}


@pytest.mark.parametrize("sent", NOT_HTTP.values(), ids=NOT_HTTP)
@pytest.mark.parametrize("piece", [10**6, 100])
def test_what_breaks_a_rule_of_http_is_a_400(sent: bytes, piece: int) -> None:
    error = refusal(*(sent[begin : begin + piece] for begin in range(0, len(sent), piece)))
    assert (error.status, error.body.error.code) == (400, "invalid_http")
    assert re.fullmatch(r"This is not a valid HTTP/1\.1 request: [^A-Z].*\.|.*(HTTP|CONNECT|CRLF|LF).*", str(error))


@pytest.mark.parametrize("host", [b"", b"a", b"a:80", b"a.b-c_d:", b"[::1]:8000", b"127.0.0.1:1", b"x%20y"])
def test_hosts_are_names_or_addresses(host: bytes) -> None:
    assert read(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host).ended == 1


def test_small_chunks_are_not_taken_for_extensions() -> None:
    assert read(CHUNKED, *[b"1\r\na\r\n"] * 5000, b"0\r\n\r\n").bodies == [b"a" * 5000]
    assert read(CHUNKED + b"1\r\na\r\n" * 5000 + b"0\r\n\r\n").ended == 1


LONG = b"a" * (MAX_HEADER_BYTES + 1)
ENDLESS = LONG * 10
TOO_LARGE = {
    "address": (414, b"POST /" + LONG + b" HTTP/1.1\r\n\r\n"),
    "endless address": (414, b"POST /" + ENDLESS),
    "header": (431, HEAD + b"X-Long: " + LONG + b"\r\n\r\n"),
    "endless header": (431, HEAD + b"X-Long: " + ENDLESS),
    "endless name": (431, HEAD + ENDLESS),
    "headers": (431, HEAD + b"".join(b"X-%d: %s\r\n" % (number, LONG[:4096]) for number in range(17))),
    "many headers": (431, HEAD + b"".join(b"X-%d: a\r\n" % number for number in range(MAX_HEADERS)) + b"\r\n"),
    "trailers": (431, CHUNKED + b"0\r\n" + b"".join(b"X-%d: %s\r\n" % (number, LONG[:4096]) for number in range(17))),
}


@pytest.mark.parametrize(("status", "sent"), TOO_LARGE.values(), ids=TOO_LARGE)
@pytest.mark.parametrize("piece", [10**7, 1500])
def test_heads_that_are_too_long_are_refused(status: int, sent: bytes, piece: int) -> None:
    error = refusal(*(sent[begin : begin + piece] for begin in range(0, len(sent), piece)))
    assert error.status == status
    assert error.body.error.code == ("uri_too_long" if status == 414 else "headers_too_large")


def test_as_many_headers_as_are_allowed_are_taken() -> None:
    (head,) = read(HEAD + b"".join(b"X-%d: a\r\n" % number for number in range(MAX_HEADERS - 1)) + b"\r\n").heads
    assert len(head.headers) == MAX_HEADERS
