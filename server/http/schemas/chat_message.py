"""A message of a conversation as requests have it: its role, its text and images, and its tool calls.

Knows what a well-formed message is; nothing of how a conversation reads.
"""

from typing import Annotated, Any, Self

from pydantic import ConfigDict, FailFast, Field, PlainValidator, WithJsonSchema, model_validator

from persimmon.server.http.schemas.other_fields import (
    IMAGE_PARTS,
    REFUSED_IN_MESSAGES,
    REFUSED_PARTS,
    WITHOUT_EFFECT_IN_IMAGES,
    WITHOUT_EFFECT_IN_MESSAGES,
    WITHOUT_EFFECT_IN_PARTS,
)
from persimmon.server.http.schemas.request_object import (
    RequestObject,
    WithoutEffect,
    invalid,
    missing,
    unknown,
    unsupported,
)
from persimmon.server.http.schemas.tool_fields import MessageToolCall

MAX_MESSAGES = 16384
"""Each takes several tokens, so that a longer conversation does not fit into a context of 64k tokens."""

MAX_CALLS_OF_A_MESSAGE = 1024

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""The types of parts that hold text, and the field that it is in."""

_CONTENT_FORMS = 'it must be a string or a list of parts like {"type": "text", "text": "..."}'
_IMAGE_FORM = 'it must be an object like {"url": "data:image/png;base64,..."}'


class ImagePart:
    """An image of a message.

    Args:
        number: of the part in the message's content.
        url: a data: URL with the image in it, or an http(s) URL of one.
    """

    def __init__(self, number: int, url: str) -> None:
        self.number = number
        self._url = url

    @property
    def url_length(self) -> int:
        """Characters of its URL, 0 once that has been taken."""
        return len(self._url)

    def take_url(self) -> str:
        """Its URL, which is forgotten here: a request lives as long as its answer, and URLs may be megabytes."""
        url, self._url = self._url, ""
        return url


Contents = tuple[str | ImagePart, ...]
"""The content of a message with images: these in order, and the texts before, between and after them."""


def _content(value: object) -> str | Contents:
    """A message's content; of several texts in a row, a line for each."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(_CONTENT_FORMS)
    contents: list[str | ImagePart] = []
    for number, given in enumerate(value):
        part = _part(number, given)
        if isinstance(part, str) and contents and isinstance(before := contents[-1], str):
            contents[-1] = f"{before}\n{part}"
        else:
            contents.append(part)
    return contents[0] if len(contents) == 1 and isinstance(contents[0], str) else tuple(contents)


def _part(number: int, part: object) -> str | ImagePart:
    if not isinstance(part, dict):
        raise ValueError(_CONTENT_FORMS)
    kind = part.get("type")
    if not isinstance(kind, str):
        raise missing((number, "type")) if kind is None else invalid((number, "type"), "it must be a string")
    if kind in REFUSED_PARTS:
        raise unsupported((number, "type"), REFUSED_PARTS[kind])
    if kind not in _TEXT_PARTS and kind not in IMAGE_PARTS:
        raise invalid((number, "type"), f"{kind[:40]!r} is not a supported content type; send 'text'")
    field = _TEXT_PARTS.get(kind, "image_url")
    without_effect = WITHOUT_EFFECT_IN_IMAGES if kind in IMAGE_PARTS else WITHOUT_EFFECT_IN_PARTS
    for name, given in part.items():
        if given is not None and name not in ("type", field) and name not in without_effect:
            raise unknown((number, name))
    value = part.get(field)
    if value is None:
        raise missing((number, field))
    if kind in IMAGE_PARTS:
        return ImagePart(number, _image_url((number, field), value))
    if not isinstance(value, str):
        raise invalid((number, field), "it must be a string")
    return value


def _image_url(place: tuple[str | int, ...], value: object) -> str:
    """The URL in an image part: OpenAI's object, or the string of its newer API and of vLLM."""
    if isinstance(value, dict):
        for name, given in value.items():
            if given is not None and name not in ("url", "detail"):
                raise unknown((*place, name))
        place = (*place, "url")
        if (value := value.get("url")) is None:
            raise missing(place)
        if not isinstance(value, str):
            raise invalid(place, "it must be a string")
    if not isinstance(value, str):
        raise invalid(place, _IMAGE_FORM)
    return value


def _without_effect(fields: WithoutEffect) -> dict[str, Any]:
    return {name: {"description": f"Accepted without effect: {reason}."} for name, reason in fields.items()}


_ONLY_NULL = {"type": "null"}
_URL_SCHEMA = {"type": "string", "description": "A data: URL in base64, or an http(s) URL of an allowed host."}
_URL_OBJECT_SCHEMA = {
    "type": "object",
    "required": ["url"],
    "properties": {"url": _URL_SCHEMA, **_without_effect({"detail": WITHOUT_EFFECT_IN_IMAGES["detail"]})},
    "additionalProperties": _ONLY_NULL,
}
_TEXT_PART_SCHEMA = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {
        "type": {"enum": ["text", "input_text", "output_text"]},
        "text": {"type": "string"},
        **_without_effect(WITHOUT_EFFECT_IN_PARTS),
    },
    "additionalProperties": _ONLY_NULL,
}
_IMAGE_PART_SCHEMA = {
    "description": "An image: PNG, JPEG, WebP or GIF. Only in messages of users and systems, and only for models that "
    "read images.",
    "type": "object",
    "required": ["type", "image_url"],
    "properties": {
        "type": {"enum": [*IMAGE_PARTS]},
        "image_url": {"anyOf": [_URL_SCHEMA, _URL_OBJECT_SCHEMA]},
        **_without_effect(WITHOUT_EFFECT_IN_IMAGES),
    },
    "additionalProperties": _ONLY_NULL,
}
_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "items": {"anyOf": [_TEXT_PART_SCHEMA, _IMAGE_PART_SCHEMA]}},
    ]
}


# The rules of ChatMessage that hold between fields.
_MESSAGE_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {
            "properties": {
                "role": {"enum": ["system", "developer", "user"]},
                "tool_calls": {"maxItems": 0},
                "tool_call_id": {"type": "null"},
                "refusal": {"type": "null"},
            },
            "required": ["content"],
        },
        {"properties": {"role": {"const": "assistant"}, "tool_call_id": {"type": "null"}}},
        {
            "properties": {
                "role": {"const": "tool"},
                "tool_calls": {"maxItems": 0},
                "tool_call_id": {"type": "string"},
                "refusal": {"type": "null"},
            },
            "required": ["content", "tool_call_id"],
        },
    ]
}


class ChatMessage(RequestObject):
    """One message of a conversation.

    An assistant's may be as any server has answered: its content may be null, its refusal not.
    """

    model_config = ConfigDict(json_schema_extra=_MESSAGE_SCHEMA)
    refused = REFUSED_IN_MESSAGES
    without_effect = WITHOUT_EFFECT_IN_MESSAGES

    role: str = Field(description='"system" (or "developer"), "user", "assistant" or "tool".')
    content: Annotated[str | Contents | None, PlainValidator(_content), WithJsonSchema(_CONTENT_SCHEMA)] = Field(
        None, description="A string, or parts: texts, which are joined with newlines, and images."
    )
    refusal: str | None = Field(None, description="Assistant only: the refusal that stands in place of an answer.")
    name: str | None = Field(None, description="Name of the speaker or the function; the chat format does not use it.")
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=MAX_CALLS_OF_A_MESSAGE), FailFast()] = Field(
        default=[], description="Assistant only: the calls of its answer."
    )
    tool_call_id: str | None = Field(None, description="Tool only: the id of the call whose result this is.")

    @model_validator(mode="after")
    def _what_its_role_needs(self) -> Self:
        for field in ("tool_calls", "refusal"):
            if getattr(self, field) and self.role != "assistant":
                raise invalid(field, f"only assistant messages may have it; this message's role is {self.role[:40]!r}")
        if self.tool_call_id is not None and self.role != "tool":
            raise invalid("tool_call_id", f"only tool messages may have it; this message's role is {self.role[:40]!r}")
        if self.role == "tool" and self.tool_call_id is None:
            raise missing("tool_call_id")
        if self.content is None and self.role != "assistant":
            raise missing("content")
        if self.role in ("assistant", "tool") and self.images:
            place = ("content", self.images[0].number)
            raise invalid(place, f"only user and system messages may have images; this message's role is {self.role!r}")
        return self

    @property
    def text(self) -> str:
        """What the message says: its content without images, or an assistant's refusal, or nothing."""
        if isinstance(self.content, tuple):
            return "\n".join(part for part in self.content if isinstance(part, str))
        return self.content or self.refusal or ""

    @property
    def images(self) -> list[ImagePart]:
        """The images of its content, in order."""
        return [part for part in self.content if isinstance(part, ImagePart)] if isinstance(self.content, tuple) else []


Messages = Annotated[list[ChatMessage], Field(max_length=MAX_MESSAGES), FailFast()]
"""A conversation."""
