"""An answer in JSON: a msgspec struct and its status."""

from http import HTTPStatus
from typing import Generic, TypeVar

import msgspec
from fastapi import Response

_Content = TypeVar("_Content", bound=msgspec.Struct)


class JsonResponse(Response, Generic[_Content]):
    """A struct as JSON.  An endpoint that declares it as its answer is documented with the struct's schema.

    Args:
        content: the struct.
        status: HTTP's.
    """

    def __init__(self, content: _Content, status: int = HTTPStatus.OK) -> None:
        super().__init__(msgspec.json.encode(content), status, media_type="application/json")
