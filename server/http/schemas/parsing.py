"""From a request's body to the request, or to a 400 that says what is wrong with it and where.

Knows pydantic's errors and no field by name.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from persimmon.server.http.errors import ApiError, bad_request
from persimmon.server.http.schemas.request_object import Refusal

MAX_OBJECTS = 250_000
MAX_VALUES = 4_000_000
"""A value takes about a hundred bytes while a body is read, an object several times as much."""

# One that has no end reaches to the body's end, so that no character is looked at twice.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_Request = TypeVar("_Request", bound=BaseModel)


def parse(body: bytes, kind: type[_Request]) -> _Request:
    """The request in a JSON body.

    Raises:
        ApiError: a 400 with the first thing that is wrong, and the field it is in.
    """
    _check_size(body)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _bad_request(error.errors(include_url=False)[0]) from None


def _check_size(body: bytes) -> None:
    """Raises the ApiError of a body that takes too long to read, and many times its length of memory."""
    for count, most, what in ((_objects, MAX_OBJECTS, "objects and lists"), (_values, MAX_VALUES, "values")):
        if count(body) <= most:
            continue
        # Most of them may be inside strings, such as prompts of code, so count again without strings.
        if _strings(body) > MAX_VALUES or count(_STRING.sub(b"", body)) > most:
            raise bad_request(f"The body has more than {most:,} JSON {what}; send less at a time.", None)


def _objects(body: bytes) -> int:
    return body.count(b"{") + body.count(b"[")


def _values(body: bytes) -> int:
    return body.count(b",") + _objects(body)


def _strings(body: bytes) -> int:
    return (body.count(b'"') - body.count(b'\\"')) // 2


def _bad_request(error: ErrorDetails) -> ApiError:
    context = error.get("ctx", {})
    path = _path((*error["loc"], *context.get("path", ())))
    match error["type"]:
        case "json_invalid":
            return bad_request(f"The body is not valid JSON: {context['error']}.", None, "invalid_json")
        case "model_type" if not path:
            return bad_request("The body must be a JSON object.", None)
        case "missing" | "missing_field":
            return bad_request(f"Missing required parameter: '{path}'.", path, "missing_required_parameter")
        case "extra_forbidden" | "unknown_field":
            return bad_request(f"Unknown parameter: '{path}'.", path, "unknown_parameter")
        case "unsupported":
            refusal = context["refusal"]
            message = f"'{path}' is not supported by this server: {refusal.reason}; {_remedy(refusal)}."
            return bad_request(message, path, "unsupported_parameter")
        case "invalid_field":
            return bad_request(f"Invalid '{path}': {context['reason']}.", path)
        case "value_error" if not path:
            return bad_request(f"Invalid request: {context['error']}.", None)
        case "value_error":
            return bad_request(f"Invalid '{path}': {context['error']}.", path)
        case "too_short":
            return bad_request(f"Invalid '{path}': {_items('at least', context['min_length'], context)}.", path)
        case "too_long":
            return bad_request(f"Invalid '{path}': {_items('at most', context['max_length'], context)}.", path)
        case _:
            requirement, quotation = error["msg"][0].lower() + error["msg"][1:], _quotation(error["input"])
            # A text may be a prompt, sent in the wrong place.
            private = quotation if isinstance(error["input"], str) else ""
            return bad_request(f"Invalid '{path}': {requirement}{quotation}.", path, quotation=private)


def _items(bound: str, limit: int, context: Mapping[str, Any]) -> str:
    """What a list's length has to be, and is."""
    found = "more" if context["actual_length"] is None else context["actual_length"]
    return f"expected {bound} {limit} {'item' if limit == 1 else 'items'}, not {found}"


def _remedy(refusal: Refusal) -> str:
    if refusal.instead is not None:
        return refusal.instead
    allowed = " or ".join(msgspec.json.encode(value).decode() for value in refusal.allowed)
    return f"leave it out or send {allowed}" if allowed else "leave it out"


def _quotation(value: object) -> str:
    """The end of a sentence that says what was given, where that is short."""
    if isinstance(value, str | int | float) and len(given := repr(value)) <= 40:
        return f", not {given}"
    return ""


def _path(location: Sequence[str | int]) -> str:
    """A place in the body as OpenAI writes it: messages[0].content."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
