"""What a body is: JSON by its Content-Type, and packed or not by its Content-Encoding.

Knows the two headers; what is in the JSON is `parsing`'s.
"""

import zlib
from collections.abc import Iterator
from http import HTTPStatus

from starlette.datastructures import Headers

from persimmon.server.http.errors import ApiError, bad_request

_PIECE_BYTES = 256 * 1024
"""Unpacked at once: a fraction of a millisecond."""

_GZIP = 16 + zlib.MAX_WBITS  # zlib's way to ask for gzip's format


def check_is_json(headers: Headers) -> None:
    """Makes sure that a body is said to be JSON.

    A browser lets a page of any origin send other types, and bodies without one, unasked.  Programs may leave the
    header out, as many do.

    Raises:
        ApiError: a 415 that names the header.
    """
    given = headers.get("content-type")
    if given is None and "origin" not in headers:
        return
    kind = (given or "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        found = f"The Content-Type is {kind[:100]!r}" if kind else "There is no Content-Type"
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"{found}; expected application/json. Send the header 'Content-Type: application/json' (curl: -H or "
            "--json), or with a client library pass the body as JSON.",
            code="unsupported_media_type",
        )


def unpacker(headers: Headers) -> "Gunzip | None":
    """What unpacks a body; None where it is not packed.

    Raises:
        ApiError: a 415: it is packed in another way.
    """
    codings = [coding for value in headers.getlist("content-encoding") for coding in value.lower().split(",")]
    packed = [name for coding in codings if (name := coding.strip()) not in ("", "identity")]
    if not packed:
        return None
    if packed not in (["gzip"], ["x-gzip"]):
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"The Content-Encoding is {', '.join(packed)[:100]!r}; expected gzip, or none.",
            code="unsupported_media_type",
            headers={"Accept-Encoding": "gzip"},
        )
    return Gunzip()


class Gunzip:
    """Unpacks a body in gzip's format, one or more members after one another."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(_GZIP)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What comes of the next part of the body, in pieces of a limited size: a KiB may hold a MiB.

        Raises:
            ApiError: a 400: it is not gzip's format.
        """
        while data:
            if self._member.eof:
                self._member = zlib.decompressobj(_GZIP)
            try:
                piece = self._member.decompress(data, _PIECE_BYTES)
            except zlib.error as error:
                raise _not_gzip(str(error)) from None
            data = self._member.unconsumed_tail or self._member.unused_data
            yield piece

    def end(self) -> bytes:
        """The last bytes.

        Raises:
            ApiError: a 400: the body ends too early.
        """
        rest = self._member.flush()
        if not self._member.eof:
            raise _not_gzip("it ends too early")
        return rest


def _not_gzip(reason: str) -> ApiError:
    return bad_request(
        f"The Content-Encoding is gzip, but the body is not valid gzip: {reason}.", None, "invalid_encoding"
    )
