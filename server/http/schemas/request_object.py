"""What all JSON objects of requests have in common: strict types, and no field that is silently ignored.

Knows no field by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

NAME_PATTERN = "^[a-zA-Z0-9_-]{1,64}$"
"""What OpenAI allows as the name of a function or of a format."""


@dataclass(frozen=True)
class Refusal:
    """Why a field that other servers know is refused here.

    Attributes:
        reason: completes "'field' is not supported by this server: ...".
        allowed: values that ask for nothing and are therefore accepted; null always is.
        instead: what to do to get the same; None where nothing gives it.
    """

    reason: str
    allowed: tuple[object, ...] = ()
    instead: str | None = None


Refused = Mapping[str, Refusal]
"""Fields that are refused unless their value asks for nothing."""

WithoutEffect = Mapping[str, str]
"""Fields that cannot change an answer of this server, and why.  Any value is accepted."""


class RequestObject(BaseModel):
    """A JSON object of a request: strict types, null means absent, no unknown field.

    Where an integer is expected, 8.0 is one too, as in JSON Schema: several languages write their numbers so.

    Of many unknown fields only the first is an error, so that a large object of them costs no more than a small one.

    Attributes:
        refused: fields of other servers that are not supported here.
        without_effect: fields of other servers that are accepted and not read.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    refused: ClassVar[Refused] = {}
    without_effect: ClassVar[WithoutEffect] = {}
    _names: ClassVar[frozenset[str]] = frozenset()
    _integers: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls._names = frozenset(field.alias or name for name, field in cls.model_fields.items())
        cls._integers = frozenset(
            name for name, field in cls.model_fields.items() if int in (field.annotation, *get_args(field.annotation))
        )

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        has_unknown = False
        for name, value in data.items():
            if value is None or name in cls.without_effect:
                continue
            if name in cls._names:
                is_whole = isinstance(value, float) and name in cls._integers and value.is_integer()
                kept[name] = int(value) if is_whole else value
            elif (refusal := cls.refused.get(name)) is None:
                if not has_unknown:
                    kept[name] = value
                has_unknown = True
            elif value not in refusal.allowed:
                raise unsupported(name, refusal)
        return kept

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).setdefault("properties", {})
        for name, reason in cls.without_effect.items():
            properties[name] = {"description": f"Accepted without effect: {reason}."}
        for name, refusal in cls.refused.items():
            properties[name] = {"enum": [None, *refusal.allowed], "description": f"Not supported: {refusal.reason}."}
        return schema


def invalid(field: str | tuple[str | int, ...], reason: str) -> PydanticCustomError:
    """What a validator of a whole object raises for one of its fields, or for a place further inside."""
    return PydanticCustomError("invalid_field", "", {"path": _as_path(field), "reason": reason})


def missing(field: str | tuple[str | int, ...]) -> PydanticCustomError:
    """What a validator of a whole object raises for a field that it needs and lacks."""
    return PydanticCustomError("missing_field", "", {"path": _as_path(field)})


def unknown(field: str | tuple[str | int, ...]) -> PydanticCustomError:
    """Raised by validators for an unknown field."""
    return PydanticCustomError("unknown_field", "", {"path": _as_path(field)})


def unsupported(field: str | tuple[str | int, ...], refusal: Refusal) -> PydanticCustomError:
    """What a validator raises for a field, or a value of one, that this server cannot honour."""
    return PydanticCustomError("unsupported", "", {"path": _as_path(field), "refusal": refusal})


def _as_path(field: str | tuple[str | int, ...]) -> tuple[str | int, ...]:
    return (field,) if isinstance(field, str) else field
