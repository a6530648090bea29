"""The request and the answers of POST /v1/completions, under OpenAI's names."""

from typing import Self

from msgspec import UNSET, Struct, UnsetType
from pydantic import Field, model_validator

from persimmon.server.http.schemas.field_types import Prompts
from persimmon.server.http.schemas.generation import MAX_SAMPLES, GenerationRequest
from persimmon.server.http.schemas.other_fields import (
    REFUSED_IN_COMPLETIONS,
)
from persimmon.server.http.schemas.request_object import invalid
from persimmon.server.http.schemas.usage import Usage


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
        description="Maximum number of new tokens. Default: 16, or what the context leaves if that is less. 0 only "
        "computes the prompt.",
    )
    add_special_tokens: bool = Field(
        True,
        description="Begin texts with the beginning-of-sequence token if the checkpoint does; false never adds it.",
    )
    echo: bool = Field(False, description="Begin the answer's text with the prompt.")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=5,
        description="Report the log-probability of each token, with echo also of the prompt's, and of this number of "
        "most probable tokens at its position. They are the model's own, before temperature, penalties and biases.",
    )
    best_of: int | None = Field(
        None,
        ge=1,
        le=MAX_SAMPLES,
        description="Generate this number of answers and return the n with the highest mean log-probability per "
        "token. Not in a stream.",
    )

    @model_validator(mode="after")
    def _best_of_more_than_n(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise invalid("best_of", f"it is {self.best_of} but n is {self.n}; it must be at least n")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise invalid("best_of", "in a stream it must equal n, because the best answers are known only at the end")
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
        """Number of most probable tokens to report with each token; None reports no tokens."""
        return self.logprobs


class CompletionLogprobs(Struct, frozen=True):
    r"""A completion's tokens: lists of one entry for each, natural log-probabilities under the network's own logits.

    A token's text is "bytes:\xe2" if its bytes are not whole characters.  The first token of a prompt has no
    log-probability, and so null in both lists.  `text_offset` counts characters from the beginning of the answer.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct, frozen=True):
    """One answer of a completion, or the next piece of it."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: CompletionLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(Struct, frozen=True, tag_field="object", tag="text_completion"):
    """The answer of POST /v1/completions; a chunk looks the same."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
