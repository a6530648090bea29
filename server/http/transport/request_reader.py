"""Bytes of a connection -> requests: heads and bodies, strictly HTTP/1.0 or 1.1, and bounded in size.

httptools parses.  This adds what it leaves out: limits, the rules on Host and Transfer-Encoding, and the bodies of
requests that offer to upgrade.  Knows nothing of connections, answers or time.
"""

import re
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

import httptools

from persimmon.server.http.errors import ApiError

MAX_HEADER_BYTES = 64 * 1024
"""Of a request line and its headers: nginx takes 32 KiB by default, and a long list of baggage fits."""

MAX_HEADERS = 100
"""Gunicorn's limit too."""

MAX_CHUNK_OVERHEAD = 4 * 1024
"""Bytes of a chunked body that are neither data nor chunk sizes, that is extensions: no known client sends any."""

_CHUNK_FRAMING = 16
"""Bytes around a chunk's data that are not counted as overhead: its size in hexadecimal and two line ends."""

_PIECE = 2 * 1024

# RFC 3986: a registered name, an IPv4 address, or an IPv6 address in brackets; then perhaps a port.
_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9\-._~%!$&'()*+,;=]*)(:[0-9]*)?")
_ABSOLUTE_FORM = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A request's first line and headers.

    Attributes:
        method: in capitals.
        path: percent-encoded, as it was sent, without the query.
        query: what follows the question mark.
        http_version: "1.0" or "1.1".
        headers: names in lower case.
        keep_alive: whether the client lets the connection stay open afterwards.
        expects_continue: whether it sends the body only after a 100 Continue.
    """

    method: str
    path: bytes
    query: bytes
    http_version: str
    headers: Headers
    keep_alive: bool
    expects_continue: bool

    @property
    def decoded_path(self) -> str:
        """The path as routes know it."""
        path = self.path.decode("ascii")
        return urllib.parse.unquote(path) if "%" in path else path


class RequestReader:
    """Reads the requests of one connection, one after the other.

    Args:
        on_head: called with each head.
        on_body: called with each part of the body.
        on_end: called at a request's end.

    Attributes:
        in_head: whether a request has begun whose headers have not ended.
    """

    def __init__(
        self, on_head: Callable[[RequestHead], None], on_body: Callable[[bytes], None], on_end: Callable[[], None]
    ) -> None:
        self._on_head = on_head
        self._on_body = on_body
        self._on_end = on_end
        self.in_head = False
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._headers: Headers = []
        self._header_bytes = 0
        self._unread = 0  # bytes that came and that no callback has accounted for
        self._in_chunks = False
        self._in_plain_body = False
        self._replaying = False
        self._refusal: ApiError | None = None

    def feed(self, data: bytes) -> None:
        """Reads what came next.

        Raises:
            ApiError: it is not a request that this server reads; nothing can be read after it.
        """
        view, begin = memoryview(data), 0
        while begin < len(data):
            # In small pieces where the parser reads what it does not report, so that limits hold before a request ends.
            end = len(data) if self._in_plain_body else begin + _PIECE
            begin += self._feed(view[begin:end])

    def _feed(self, piece: memoryview) -> int:
        """Reads a piece, or its beginning; how many bytes."""
        self._unread += len(piece)
        used = len(piece)
        try:
            self._parser.feed_data(piece)
        except httptools.HttpParserUpgrade as offer:
            used = offer.args[0]
            self._unread = 0
            self._decline_upgrade()
        except httptools.HttpParserError as error:
            raise self._refusal or _not_http(str(error)) from None
        self._unread = max(0, self._unread)
        if self.in_head and self._unread + self._header_bytes > MAX_HEADER_BYTES:
            raise _headers_too_long()
        if self._in_chunks and self._unread > MAX_CHUNK_OVERHEAD:
            raise _not_http(f"chunk extensions are longer than {MAX_CHUNK_OVERHEAD} bytes")
        return used

    def close(self) -> None:
        """Reads no more.  Parser and reader know each other, and the garbage collector hardly ever runs."""
        del self._parser, self._on_head, self._on_body, self._on_end

    def on_message_begin(self) -> None:
        """Called by the parser at a request's first byte."""
        if self._replaying:
            return
        self.in_head = True
        self._url, self._headers, self._header_bytes = b"", [], 0

    def on_url(self, url: bytes) -> None:
        """Called with the next part of the request's target."""
        if self._replaying:
            return
        self._url += url
        self._unread -= len(url)
        self._header_bytes += len(url)
        if self._header_bytes > MAX_HEADER_BYTES:
            self._refuse(_too_long(HTTPStatus.REQUEST_URI_TOO_LONG, "The address is", "uri_too_long"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called with each whole header, and with each trailer of a chunked body."""
        if self._replaying:
            return
        size = len(name) + len(value) + 4
        self._unread -= size
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            self._refuse(_headers_too_long())
        if not self.in_head:
            return  # nothing here has a use for trailers
        if len(self._headers) >= MAX_HEADERS:
            message = f"The request has more than {MAX_HEADERS} headers."
            self._refuse(ApiError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, message, code="headers_too_large"))
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Called when the body begins, if there is one."""
        if self._replaying:
            return
        self._unread -= 24  # the method, the version and two line ends
        version, method = self._parser.get_http_version(), self._parser.get_method().decode("ascii")
        try:
            self._in_chunks = _check_head(version, method, self._headers)
            path, query = _split_target(self._url)
        except ApiError as error:
            self._refuse(error)
        self.in_head = False
        self._in_plain_body = not self._in_chunks
        expects = any(name == b"expect" and value.lower() == b"100-continue" for name, value in self._headers)
        keep_alive = self._parser.should_keep_alive()
        self._on_head(
            RequestHead(
                method=method,
                path=path,
                query=query,
                http_version=version,
                headers=self._headers,
                keep_alive=keep_alive,
                expects_continue=expects,
            )
        )

    def on_body(self, body: bytes) -> None:
        """Called with the next part of a body."""
        self._unread -= len(body)
        self._on_body(body)

    def on_chunk_header(self) -> None:
        """Called with each chunk's size, extensions included."""
        self._unread -= _CHUNK_FRAMING

    def on_message_complete(self) -> None:
        """Called at a request's end; by the first parser of an upgrade offer before its body."""
        if self._parser.should_upgrade():
            return
        self._in_chunks = self._in_plain_body = False
        self._unread = 0
        self._on_end()

    def _decline_upgrade(self) -> None:
        """Goes on reading HTTP/1.1 where the client offered another protocol (RFC 9110, 7.8: a server may ignore it).

        httptools ends at the headers of such a request and leaves its body in the stream.  So another parser takes its
        place, which is given the same framing without the offer.
        """
        framing = {b"content-length", b"transfer-encoding"}
        lines = [name + b": " + value + b"\r\n" for name, value in self._headers if name in framing]
        if not self._parser.should_keep_alive():
            lines.append(b"connection: close\r\n")
        head = b"POST / HTTP/" + self._parser.get_http_version().encode() + b"\r\n" + b"".join(lines) + b"\r\n"
        self._replaying = True
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(head)
        self._replaying = False

    def _refuse(self, error: ApiError) -> None:
        self._refusal = error
        raise error  # the parser stops at it, and `feed` raises it again


def _check_head(version: str, method: str, headers: Headers) -> bool:
    """Checks what the parser does not; whether the body comes in chunks.

    Raises:
        ApiError: the head breaks a rule of RFC 9112, or asks for what this server does not do.
    """
    if version not in ("1.0", "1.1"):
        raise _not_http(f"its version is {version}; expected 1.1 or 1.0")
    if method == "CONNECT":
        raise _not_http("CONNECT is for proxies, and this server is not one")
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (version == "1.1" and not hosts):
        raise _not_http(f"it has {len(hosts)} Host headers; expected one")
    if hosts and not _HOST.fullmatch(hosts[0]):
        raise _not_http("its Host header is not a host name or an address with an optional port")
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    if not codings:
        return False
    if version == "1.0":
        raise _not_http("HTTP/1.0 has no Transfer-Encoding; send Content-Length")
    if len(codings) > 1 or codings[0].strip().lower() != b"chunked":
        raise _not_http("the only Transfer-Encoding that this server reads is chunked")
    return True


def _split_target(target: bytes) -> tuple[bytes, bytes]:
    """Path and query of a request's target, in origin form, absolute form or '*'."""
    if not target.startswith(b"/") and target != b"*":
        absolute = _ABSOLUTE_FORM.match(target)
        if absolute is None:
            raise _not_http("its address is not a path")
        target = target[absolute.end() :]
        target = target if target.startswith(b"/") else b"/" + target
    path, _, query = target.partition(b"#")[0].partition(b"?")
    return path, query


def _not_http(reason: str) -> ApiError:
    reason = reason[:1].lower() + reason[1:] if reason[1:2].islower() else reason
    return ApiError(HTTPStatus.BAD_REQUEST, f"This is not a valid HTTP/1.1 request: {reason}.", code="invalid_http")


def _headers_too_long() -> ApiError:
    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    return _too_long(status, "The request line and its headers are", "headers_too_large")


def _too_long(status: HTTPStatus, what: str, code: str) -> ApiError:
    return ApiError(status, f"{what} longer than {MAX_HEADER_BYTES} bytes.", code=code)
