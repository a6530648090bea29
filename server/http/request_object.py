"""What all JSON objects of requests have in common: strict types, and no field passed over in silence.

Knows no field by name.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

Neutral = dict[str, tuple[object, ...]]
"""Fields that others know and this server does not, with the values that ask for nothing.

Any other value is refused by name; null is neutral everywhere.
"""

NAME_PATTERN = "^[a-zA-Z0-9_-]{1,64}$"
"""What OpenAI allows as the name of a function or of a format."""


class RequestObject(BaseModel):
    """A JSON object of a request: strict types, null as good as absent, no unknown field.

    Attributes:
        neutral: fields that are known by name alone.
        replaced: of these the ones that have a successor, and that.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    neutral: ClassVar[Neutral] = {}
    replaced: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if value is None:
                continue
            if (allowed := cls.neutral.get(name)) is None:
                kept[name] = value
            elif value not in allowed:
                context = {"field": name, "allowed": allowed, "instead": cls.replaced.get(name)}
                raise PydanticCustomError("unsupported", "", context)
        return kept


def invalid(field: str, reason: str) -> PydanticCustomError:
    """What a validator of a whole object raises for one of its fields."""
    return PydanticCustomError("invalid_field", "", {"field": field, "reason": reason})


def missing(field: str) -> PydanticCustomError:
    """What a validator of a whole object raises for a field that it needs and lacks."""
    return PydanticCustomError("missing_field", "", {"field": field})
