"""An error as bytes, for what comes over a connection and is not a request."""

from collections.abc import Iterable

from persimmon.server.http.errors import ApiError
from persimmon.server.http.transport.exchange import status_line


def refusal(error: ApiError, headers: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    """A whole answer, after which the connection ends.

    Args:
        error: what the client gets.
        headers: further ones.
    """
    response = error.response()
    lines = [status_line(response.status_code)]
    for name, value in (*headers, *response.raw_headers, (b"connection", b"close")):
        lines += (name, b": ", value, b"\r\n")
    return b"".join((*lines, b"\r\n", bytes(response.body)))
