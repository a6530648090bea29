"""The types of fields that are more than a number or a text: prompts, stop strings, biases.

Each is validated in time and memory bounded by what is valid: the first wrong item is the error.
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, FailFast, Field, PlainValidator, WithJsonSchema

MAX_BIASED_TOKENS = 1024
MAX_SALT_LENGTH = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_TOKENS = 1024
MAX_STOP_STRING_LENGTH = 1000
_MAX_ID_DIGITS = 18


def _token_ids(value: object) -> bool:
    return isinstance(value, list) and set(map(type, value)) == {int}


def _prompts(value: object) -> list[str | list[int]]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _token_ids(value):
            return [value]
        if all(isinstance(item, str) for item in value) or all(map(_token_ids, value)):
            return value
    raise ValueError("it must be a string, a list of strings, a list of token ids or a list of such lists, not empty")


def _logit_bias(value: object) -> dict[int, float]:
    """Token ids, which JSON can only write as strings, with their biases."""
    if not isinstance(value, dict):
        raise ValueError('it must be an object of token ids and biases, like {"71013": -100}')
    if len(value) > MAX_BIASED_TOKENS:
        raise ValueError(f"it has {len(value)} tokens; at most {MAX_BIASED_TOKENS} may have a bias")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= _MAX_ID_DIGITS):
            raise ValueError(f"{key[:40]!r} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {key} must be a number from -100 to 100")
        if int(key) in biases:
            raise ValueError(f"token {int(key)} has two biases")
        biases[int(key)] = float(bias)
    return biases


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


_TOKEN_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        _TOKEN_IDS_SCHEMA,
        {"type": "array", "items": _TOKEN_IDS_SCHEMA, "minItems": 1},
    ]
}
Prompts = Annotated[list[str | list[int]], PlainValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
"""One or more texts, or lists of token ids; in JSON a single one may stand for itself."""

CacheSalt = Annotated[
    str | None,
    Field(
        min_length=1,
        max_length=MAX_SALT_LENGTH,
        description="Share cached prefixes only with requests that have the same salt, so that other clients cannot "
        "infer prompts from response times. Each API key already has its own salt.",
    ),
]
"""A field of vLLM's."""

ChatTemplateOptions = Annotated[
    dict[str, Any] | None,
    Field(
        description="Variables for the checkpoint's own chat template. A model with Adept's format takes none.",
    ),
]
"""A field of vLLM's."""

_LOGIT_BIAS_SCHEMA = {
    "type": "object",
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    "propertyNames": {"pattern": "^[0-9]+$"},
    "maxProperties": MAX_BIASED_TOKENS,
}
LogitBias = Annotated[dict[int, float], PlainValidator(_logit_bias), WithJsonSchema(_LOGIT_BIAS_SCHEMA)]
"""Token ids with what is added to their logits."""

_STOP_STRING_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_STRING_LENGTH}
_STOP_SCHEMA = {
    "anyOf": [_STOP_STRING_SCHEMA, {"type": "array", "items": _STOP_STRING_SCHEMA, "maxItems": MAX_STOP_STRINGS}]
}
StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_STRING_LENGTH)]],
    Field(max_length=MAX_STOP_STRINGS),
    FailFast(),
    BeforeValidator(_as_list),
    WithJsonSchema(_STOP_SCHEMA),
]
"""One or more strings; in JSON a single one may stand for itself."""

StopTokens = Annotated[list[int], Field(max_length=MAX_STOP_TOKENS), FailFast()]

TokenIds = Annotated[list[int], FailFast()]
