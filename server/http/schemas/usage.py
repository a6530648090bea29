"""How many tokens a request took, under OpenAI's names.

msgspec structs, as all answers are: one is built and encoded for every token.  A field that is UNSET does not appear in
the JSON; what OpenAI calls "object", the kind of answer, is a struct's tag.
"""

from msgspec import UNSET, Struct, UnsetType


class PromptTokensDetails(Struct, frozen=True):
    """Where the prompt's tokens came from, and how many of them are its images': patches and ends of rows."""

    cached_tokens: int
    audio_tokens: int = 0
    image_tokens: int | UnsetType = UNSET


class CompletionTokensDetails(Struct, frozen=True):
    """Tokens of an answer other than text: none. Clients of reasoning models always read this field."""

    reasoning_tokens: int = 0
    audio_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


_ONLY_TEXT = CompletionTokensDetails()


class Usage(Struct, frozen=True):
    """The tokens of a request: each prompt counted once, every answer counted, its end-of-text token too."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails = _ONLY_TEXT
