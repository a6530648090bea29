"""The requests of the endpoints between texts and token ids: fields, types and limits, under vLLM's names."""

from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from server.http.chat_message import ChatMessage
from server.http.request_object import Neutral, RequestObject, invalid
from server.http.tool_fields import MAX_TOOLS, Tool

_NEUTRAL: Neutral = {
    "add_generation_prompt": (True,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
}


class TokenizeRequest(RequestObject):
    """The body of POST /tokenize: a text, or a conversation as /v1/chat/completions takes it."""

    neutral = _NEUTRAL

    model: str | None = Field(None, description="The served model's name, which is also the default.")
    prompt: str | None = Field(None, description="A text.")
    messages: list[ChatMessage] = Field(default=[], description="A conversation, in place of prompt.")
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] = Field(
        default=[], description="Functions that the model may call in it; only with messages."
    )
    add_special_tokens: bool = Field(
        True, description="Begin with the beginning-of-sequence token where completions do; false never does."
    )
    return_token_strs: bool = Field(False, description="Add each token's piece of the vocabulary.")

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise PydanticCustomError("value_error", "", {"error": "give either prompt or messages"})
        if self.tools and not self.messages:
            raise invalid("tools", "it is only allowed with messages")
        return self


class DetokenizeRequest(RequestObject):
    """The body of POST /detokenize."""

    model: str | None = Field(None, description="The served model's name, which is also the default.")
    tokens: list[int] = Field(description="Token ids.")
