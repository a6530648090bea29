"""--limit-mm-per-prompt: how much a request may hold besides text, in vLLM's JSON."""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_EXAMPLE = '{"image": 4}'


class MediaLimits(BaseModel):
    """What a request may hold besides text.

    Attributes:
        image: number of images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    image: int = Field(ge=0)

    @classmethod
    def from_json(cls, text: str) -> "MediaLimits":
        """Reads what --limit-mm-per-prompt gives.

        Raises:
            ValueError: a sentence that says what is allowed.
        """
        try:
            given: Any = json.loads(text)
            return cls.model_validate(given)
        except ValidationError:
            raise ValueError(f"expected only the key image, with a number from 0 on, for example {_EXAMPLE}") from None
        except (ValueError, RecursionError):
            raise ValueError(f"expected JSON, for example {_EXAMPLE}") from None
