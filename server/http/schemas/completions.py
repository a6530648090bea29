"""The request of POST /v1/completions, under OpenAI's names."""

from typing import Self

from pydantic import Field, model_validator

from persimmon.server.http.schemas.field_types import Prompts
from persimmon.server.http.schemas.generation import MAX_SAMPLES, GenerationRequest
from persimmon.server.http.schemas.other_fields import (
    REFUSED_IN_COMPLETIONS,
)
from persimmon.server.http.schemas.request_object import invalid


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    refused = REFUSED_IN_COMPLETIONS
    is_chat = False
    prompt_field = "prompt"
    default_max_tokens = 16

    prompt: Prompts = Field(description="One or more texts, or lists of token ids, to continue.")
    max_tokens: int | None = Field(
        None,
        ge=0,
        description="At most this many tokens. Default: 16, or what the context leaves if that is less. "
        "0 only computes the prompt.",
    )
    add_special_tokens: bool = Field(
        True,
        description="Begin texts with the beginning-of-sequence token where the checkpoint does; false never does.",
    )
    echo: bool = Field(False, description="Begin the answer's text with the prompt's.")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=5,
        description="Report the log-probability of each token, the prompt's too with echo, and of so many most "
        "probable ones in its place: the network's own, before temperature, penalties and biases.",
    )
    best_of: int | None = Field(
        None,
        ge=1,
        le=MAX_SAMPLES,
        description="Make so many answers and return the n whose tokens have the highest mean log-probability. "
        "Not in a stream.",
    )

    @model_validator(mode="after")
    def _best_of_more_than_n(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise invalid("best_of", f"it is {self.best_of} but n is {self.n}; it must be at least n")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise invalid("best_of", "in a stream it must equal n: the best answers are known at the end")
        return self

    @property
    def samples(self) -> tuple[str, int]:
        """The field that says how many samples each prompt gets, and what it says."""
        return super().samples if self.best_of is None else ("best_of", self.best_of)

    @property
    def add_bos(self) -> bool | None:
        """Whether texts begin with BOS; None does what the checkpoint says."""
        return None if self.add_special_tokens else False

    @property
    def echoes(self) -> bool:
        """Whether an answer begins with its prompt."""
        return self.echo

    @property
    def reported_logprobs(self) -> int | None:
        """How many of the most probable tokens to report beside each; None reports no tokens."""
        return self.logprobs
