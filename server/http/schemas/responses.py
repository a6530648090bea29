"""The answers of completions, chats and the list of models, under OpenAI's own names; a chunk of a stream included.

msgspec structs: one is built and encoded for every token.  A field that is UNSET does not appear in the JSON;
what OpenAI calls "object", the kind of answer, is the struct's tag.
"""

from msgspec import UNSET, Struct, UnsetType


class PromptTokensDetails(Struct, frozen=True):
    """Where the prompt's tokens came from."""

    cached_tokens: int
    audio_tokens: int = 0


class CompletionTokensDetails(Struct, frozen=True):
    """What the answers' tokens are, beside text: nothing.  Clients of models that reason read it unasked."""

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


class CompletionLogprobs(Struct, frozen=True):
    r"""A completion's tokens: lists of one entry for each, natural log-probabilities under the network's own logits.

    A token's text is "bytes:\xe2" where its bytes are no whole characters.  The first token of a prompt has no
    log-probability, and so null in both lists.  `text_offset` counts characters from the beginning of the answer.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(Struct, frozen=True):
    """A token that might have come, and its natural log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(Struct, frozen=True):
    """A token of an answer, its natural log-probability under the network's own logits, and what might have come."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    """The tokens of a chat's answer, or of the next piece of it."""

    content: list[ChatTokenLogprob]
    refusal: None = None


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


class CalledFunction(Struct, frozen=True):
    """The function that is called, and its arguments: a JSON object, as the model wrote it."""

    name: str
    arguments: str


class ChatToolCall(Struct, frozen=True, tag_field="type", tag="function"):
    """A call that an answer makes; the message with its result names the id."""

    id: str
    function: CalledFunction


class ChatMessage(Struct, frozen=True):
    """A whole answer: its content, or calls of tools."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    tool_calls: list[ChatToolCall] | UnsetType = UNSET


class ChatChoice(Struct, frozen=True):
    """One answer of a chat completion."""

    index: int
    message: ChatMessage
    finish_reason: str | None
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct, frozen=True, tag_field="object", tag="chat.completion"):
    """The answer of POST /v1/chat/completions."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: str | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class FunctionDelta(Struct, frozen=True):
    """What a chunk adds to a call's function: its name once, then its arguments in pieces."""

    name: str | UnsetType = UNSET
    arguments: str = ""


class ToolCallDelta(Struct, frozen=True, kw_only=True):
    """What a chunk adds to a call; which one, says its index.  Its id and type come with the function's name."""

    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionDelta


class ChatDelta(Struct, frozen=True):
    """What a chunk adds to an answer."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(Struct, frozen=True):
    """The next piece of one answer of a chat completion."""

    index: int
    delta: ChatDelta
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(Struct, frozen=True, tag_field="object", tag="chat.completion.chunk"):
    """A chunk of a streamed chat completion."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    service_tier: str | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Model(Struct, frozen=True, tag_field="object", tag="model"):
    """A model that the server serves.

    `task` says what it is for, beside embeddings: "generate", "classify" or "token_classify".  The labels are a
    classifier's, in the order of its probabilities.
    """

    id: str
    created: int
    task: str
    max_model_len: int | UnsetType = UNSET
    labels: list[str] | UnsetType = UNSET
    owned_by: str = "persimmon"


class ModelList(Struct, frozen=True, tag_field="object", tag="list"):
    """The answer of GET /v1/models."""

    data: list[Model]
