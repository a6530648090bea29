"""The requests and answers of the endpoints between texts and token ids: fields and limits, under vLLM's names."""

from typing import Annotated, Self

from msgspec import UNSET, Struct, UnsetType
from pydantic import FailFast, Field, model_validator
from pydantic_core import PydanticCustomError

from persimmon.server.http.schemas.chat_message import Messages
from persimmon.server.http.schemas.field_types import ChatTemplateOptions, TokenIds
from persimmon.server.http.schemas.other_fields import REFUSED_IN_TOKENIZE
from persimmon.server.http.schemas.request_object import RequestObject, invalid
from persimmon.server.http.schemas.tool_fields import MAX_TOOLS, Tool


class TokenizeRequest(RequestObject):
    """The body of POST /tokenize: a text, or a conversation as /v1/chat/completions takes it."""

    refused = REFUSED_IN_TOKENIZE

    model: str | None = Field(None, description="The served model's name. Default: that name.")
    prompt: str | None = Field(None, description="A text.")
    messages: Messages = Field(default=[], description="A conversation, instead of prompt.")
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS), FailFast()] = Field(
        default=[], description="Functions that the model may call in it; only with messages."
    )
    chat_template_kwargs: ChatTemplateOptions = None
    add_special_tokens: bool = Field(
        True,
        description="Begin a prompt with the beginning-of-sequence token if completions do; false never adds it. The "
        "chat format adds its own.",
    )
    return_token_strs: bool = Field(False, description="Add the text of each token in the vocabulary.")

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise PydanticCustomError("value_error", "", {"error": "give either prompt or messages"})
        if self.tools and not self.messages:
            raise invalid("tools", "it is only allowed with messages")
        if self.chat_template_kwargs and not self.messages:
            raise invalid("chat_template_kwargs", "it is only allowed with messages")
        return self


class DetokenizeRequest(RequestObject):
    """The body of POST /detokenize."""

    model: str | None = Field(None, description="The served model's name. Default: that name.")
    tokens: TokenIds = Field(description="Token ids.")


class Tokens(Struct, frozen=True):
    """The answer of POST /tokenize."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class Text(Struct, frozen=True):
    """The answer of POST /detokenize."""

    prompt: str
