"""The tables of docs/reference/fields.md: which fields are refused, which are ignored, and why.

Knows which request has which fields; nothing of what they mean.
"""

from collections.abc import Hashable, Iterable
from typing import Any, TypeVar

import msgspec

from persimmon.server.http.endpoints.endpoint import Endpoint
from persimmon.server.http.endpoints.table import ENDPOINTS
from persimmon.server.http.schemas.chat_message import ChatMessage
from persimmon.server.http.schemas.format_fields import StructuredOutputs
from persimmon.server.http.schemas.generation import StreamOptions
from persimmon.server.http.schemas.other_fields import (
    IMAGE_PARTS,
    REFUSED_IMAGES,
    REFUSED_PARTS,
    WITHOUT_EFFECT_IN_IMAGES,
    WITHOUT_EFFECT_IN_PARTS,
)
from persimmon.server.http.schemas.request_object import Refusal, RequestObject
from persimmon.server.http.schemas.tool_fields import MessageToolCall, Tool

_Fact = TypeVar("_Fact", bound=Hashable)

_PARTS: dict[str, type[RequestObject]] = {
    "`stream_options`": StreamOptions,
    "`structured_outputs`": StructuredOutputs,
    "`messages`": ChatMessage,
    "`tool_calls` of messages": MessageToolCall,
    "`tools`": Tool,
}


def field_table(endpoints: Iterable[Endpoint[Any]] = ENDPOINTS) -> str:
    """Every field that is refused, then every one that is ignored, as Markdown tables."""
    kinds = {f"`{endpoint.path}`": endpoint.request for endpoint in endpoints if endpoint.request is not None} | _PARTS
    refused = [(name, where, refusal) for where, kind in kinds.items() for name, refusal in kind.refused.items()]
    refused += [
        (", ".join(kind for kind, own in REFUSED_PARTS.items() if own == refusal), "types of content parts", refusal)
        for refusal in dict.fromkeys(REFUSED_PARTS.values())
    ]
    refused.append((", ".join(IMAGE_PARTS), "types of content parts, of models without images", REFUSED_IMAGES))
    ignored = [(name, where, why) for where, kind in kinds.items() for name, why in kind.without_effect.items()]
    ignored += [(name, "content parts", why) for name, why in WITHOUT_EFFECT_IN_PARTS.items()]
    ignored += [
        (name, "content parts of images", why)
        for name, why in WITHOUT_EFFECT_IN_IMAGES.items()
        if name not in WITHOUT_EFFECT_IN_PARTS
    ]
    lines = ["| Refused | In | Accepted values | Why, and what to do instead |", "| --- | --- | --- | --- |"]
    for name, where, refusal in _merged((name, where, _Row.of(refusal)) for name, where, refusal in refused):
        lines.append(f"| `{name}` | {where} | {refusal.allowed} | {refusal.why} |")
    lines += ["", "| Accepted without effect | In | Why |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {where} | {why} |" for name, where, why in _merged(ignored)]
    return "\n".join(lines)


class _Row(msgspec.Struct, frozen=True):
    """A refusal as the table has it."""

    allowed: str
    why: str

    @classmethod
    def of(cls, refusal: Refusal) -> "_Row":
        """The row of a refusal."""
        allowed = ", ".join(f"`{msgspec.json.encode(value).decode()}`" for value in refusal.allowed)
        return cls(allowed, refusal.reason if refusal.instead is None else f"{refusal.reason}; {refusal.instead}")


def _merged(facts: Iterable[tuple[str, str, _Fact]]) -> list[tuple[str, str, _Fact]]:
    """One entry for each field and fact, with all places where it holds; sorted by field."""
    places: dict[tuple[str, _Fact], list[str]] = {}
    for name, where, fact in facts:
        places.setdefault((name, fact), []).append(where)
    entries = [(name, ", ".join(where), fact) for (name, fact), where in places.items()]
    return sorted(entries, key=lambda entry: entry[0])
