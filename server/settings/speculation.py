"""How next tokens are guessed: what --speculative-config gives, auto, off, or JSON in vLLM's spelling."""

import json
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

DEFAULT_LOOKUP = 5
"""The n of n-grams where none is given; vLLM's."""

DEFAULT_MAX_GUESSES = 16
"""Maximum guesses of a sequence in a step where only their worth limits them otherwise."""


class SpeculativeConfig(BaseModel):
    """Guesses at the tokens that come next.

    Attributes:
        method: ngram looks for the last tokens in prompt and answer, suffix for as many of them as occurred before, up
            to 32, and auto too, with as many guesses as pay; with off nothing is guessed.
        num_speculative_tokens: maximum guesses of a sequence in a step; only with auto and off it may be left out.
        prompt_lookup_max: with ngram, the number of last tokens to look for.
        prompt_lookup_min: with ngram, the number that must have occurred before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    method: Literal["ngram", "suffix", "auto", "off"]
    num_speculative_tokens: int | None = Field(default=None, ge=1, le=64)
    prompt_lookup_max: int | None = Field(default=None, ge=1, le=64)
    prompt_lookup_min: int | None = Field(default=None, ge=1, le=64)

    @model_validator(mode="after")
    def _number(self) -> Self:
        if self.num_speculative_tokens is None and self.method not in ("auto", "off"):
            raise ValueError("num_speculative_tokens is missing")
        return self

    @model_validator(mode="after")
    def _lookup_of_ngrams(self) -> Self:
        given = [name for name in ("prompt_lookup_max", "prompt_lookup_min") if getattr(self, name) is not None]
        if self.method != "ngram" and given:
            raise ValueError(f"{given[0]} is only allowed if method is ngram")
        shortest, longest = self.lookup
        if shortest > longest:
            raise ValueError(f"prompt_lookup_min is {shortest}, more than prompt_lookup_max, which is {longest}")
        return self

    @property
    def max_guesses(self) -> int:
        """Maximum guesses of a sequence in a step."""
        return self.num_speculative_tokens or DEFAULT_MAX_GUESSES

    @property
    def lookup(self) -> tuple[int, int]:
        """The least and the greatest number of last tokens to look for; where one is not given, it is the other."""
        longest = self.prompt_lookup_max or self.prompt_lookup_min or DEFAULT_LOOKUP
        return self.prompt_lookup_min or longest, longest

    @classmethod
    def from_json(cls, text: str) -> "SpeculativeConfig":
        """Reads what --speculative-config gives: JSON, or the name of a method that needs no more.

        Raises:
            ValueError: a sentence that says what is wrong and what is allowed.
        """
        example = '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}'
        if text in ("auto", "off"):
            return cls.model_validate({"method": text})
        try:
            given: Any = json.loads(text)
        except ValueError:
            raise ValueError(f"expected auto, off or JSON, for example {example}") from None
        if not isinstance(given, dict):
            raise ValueError(f"expected an object, for example {example}")
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise ValueError(_reason(error)) from None


def _reason(error: ValidationError) -> str:
    """The first thing that is wrong."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return f"{name} is not supported; allowed are {', '.join(SpeculativeConfig.model_fields)}"
    if first["type"] == "missing":
        return f"{name} is missing"
    if not name:
        return str(first["ctx"]["error"])
    rule = first["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"{name} is {json.dumps(first['input'])}; expected {rule}"
