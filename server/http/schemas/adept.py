"""The request and the answer of Adept's own server, PUT /api, under its names and with its defaults and limits.

They are those of megatron/text_generation_server.py in github.com/persimmon-ai-labs/adept-inference.
"""

from typing import Annotated, Self

from msgspec import Struct
from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from persimmon.server.http.schemas.completions import CompletionRequest
from persimmon.server.http.schemas.request_object import Refusal, Refused, RequestObject, invalid

MAX_PROMPTS = 128

_MEGATRONS = "it belongs to Megatron and has no effect in Adept's server either"

# Adept's server refuses the first two with the same advice.
REFUSED_IN_ADEPTS_API: Refused = {
    "max_len": Refusal("Adept replaced it", instead="use tokens_to_generate"),
    "sentences": Refusal("Adept replaced it", instead="use prompts"),
    "beam_width": Refusal("beam search is not implemented"),
    "length_penalty": Refusal("beam search is not implemented", (1,)),
    "prevent_newline_after_colon": Refusal(_MEGATRONS, (False,)),
    "stop_on_double_eol": Refusal(_MEGATRONS, (False,)),
    "stop_on_eol": Refusal(_MEGATRONS, (False,)),
    "stop_token": Refusal(_MEGATRONS),
    "top_p_bound": Refusal(_MEGATRONS, (0,)),
    "top_p_decay": Refusal(_MEGATRONS, (0,)),
}


def _texts(value: object) -> list[str]:
    given = value if isinstance(value, list) else [value]
    prompts = [prompt for prompt in given if isinstance(prompt, str)]
    if not prompts or len(prompts) < len(given):
        raise ValueError("it must be a string or a list of strings, not empty")
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"it has {len(prompts)} prompts; at most {MAX_PROMPTS} are allowed")
    return prompts


_PROMPTS_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
    ]
}


class AdeptRequest(RequestObject):
    """The body of PUT /api."""

    refused = REFUSED_IN_ADEPTS_API

    prompts: Annotated[list[str], PlainValidator(_texts), WithJsonSchema(_PROMPTS_SCHEMA)] = Field(
        description="One or more texts to continue, used unchanged."
    )
    tokens_to_generate: int = Field(
        64, ge=0, description="Maximum number of new tokens; the context length limits it further. 0 requires logprobs."
    )
    logprobs: bool = Field(False, description="Report the log-probability of every token but the first.")
    temperature: float = Field(1.0, gt=0, le=100, description="No effect if top_k is 1.")
    top_k: int = Field(
        0, ge=0, le=1000, description="Sample from this number of most probable tokens; 1 is greedy; 0 means all."
    )
    top_p: float = Field(
        0.0, ge=0, le=1, description="Sample from the most probable tokens with this total probability; 0 means all."
    )
    add_bos: bool = Field(False, alias="add_BOS", description="Begin each prompt with the beginning-of-sequence token.")
    random_seed: int | None = Field(
        None,
        ge=0,
        description="The same seed, prompt and parameters give the same tokens, though not those of Adept's server.",
    )
    no_log: bool = Field(False, description="No effect: this server never logs the content of such requests.")

    @model_validator(mode="after")
    def _one_way_to_draw(self) -> Self:
        if self.top_k > 0 and self.top_p > 0:
            raise invalid("top_p", f"it is {self.top_p} and top_k is {self.top_k}; give one of the two")
        return self

    @model_validator(mode="after")
    def _something_to_answer(self) -> Self:
        if self.tokens_to_generate == 0 and not self.logprobs:
            raise invalid("tokens_to_generate", "it may be 0 only where logprobs is true")
        if not self.add_bos and not all(self.prompts):
            raise invalid("prompts", "an empty prompt needs add_BOS true")
        return self

    def completion(self, max_tokens: int) -> "AdeptCompletion":
        """What this asks for in the words of completions.

        Args:
            max_tokens: new tokens of each prompt, at most.
        """
        # Not validated once more: a temperature may be higher than a completion's.
        return AdeptCompletion.model_construct(
            prompt=[],
            temperature=0.0 if self.top_k == 1 else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p or 1.0,
            seed=self.random_seed,
            max_tokens=max_tokens,
            echo=self.logprobs,
            logprobs=0 if self.logprobs else None,
        )


class AdeptCompletion(CompletionRequest):
    """An AdeptRequest in the words of completions; its prompts are tokenized apart."""

    prompt_field = "prompts"


class AdeptAnswer(Struct, frozen=True):
    """The answer of PUT /api; each list has an entry for a prompt, in their order.

    `text` is prompts with their continuations, `generations` only the continuations; end-of-text is written out where
    it ended one.  `human_readable_tokens` are the tokens of the continuation's text.  `logprobs` are natural
    log-probabilities under the network's own logits, of each token of prompt and continuation but the first.  Without
    new tokens the second and third are empty.
    """

    text: list[str]
    logprobs: list[list[float]] | None
    generations: list[str]
    human_readable_tokens: list[list[str]]


class AdeptHealth(Struct, frozen=True):
    """The answer of GET /healthz."""

    success: bool
