"""POST /tokenize and /detokenize: text to token ids and back, as the completion endpoints do it.

No generation and no engine: both answer while the model still loads.
"""

import msgspec
from fastapi import Response
from msgspec import UNSET, Struct, UnsetType

from persimmon.model.chat import ChatPrompt
from persimmon.server.http.endpoints.service import Service
from persimmon.server.http.generation.conversation import chat_prompt
from persimmon.server.http.schemas.token_protocol import DetokenizeRequest, TokenizeRequest


class Tokens(Struct, frozen=True):
    """The answer of POST /tokenize."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class Text(Struct, frozen=True):
    """The answer of POST /detokenize."""

    prompt: str


async def tokenize(service: Service, request: TokenizeRequest) -> Response:
    """The token ids of a text or of a conversation; what generation would begin with.

    Args:
        service: what the worker serves with.
        request: well-formed.

    Raises:
        ApiError: another model's name, or messages that are no conversation.
    """
    service.check_model(request.model)
    prompt: str | ChatPrompt
    if request.prompt is None:
        prompt = await chat_prompt(service.chat, request.messages, request.tools)
    else:
        prompt = request.prompt
    add_bos = None if request.add_special_tokens or request.prompt is None else False
    field = "messages" if request.prompt is None else "prompt"
    (token_ids,) = await service.encoder.encode([field], [prompt], add_bos)
    info = service.engine.info
    answer = Tokens(
        count=len(token_ids),
        max_model_len=None if info is None else info.max_model_len,
        tokens=token_ids,
        token_strs=service.tokenizer.pieces(token_ids) if request.return_token_strs else UNSET,
    )
    return Response(msgspec.json.encode(answer), media_type="application/json")


async def detokenize(service: Service, request: DetokenizeRequest) -> Response:
    """The text of token ids.

    Args:
        service: what the worker serves with.
        request: well-formed.

    Raises:
        ApiError: another model's name, or an id outside the vocabulary.
    """
    service.check_model(request.model)
    service.check_token_ids("tokens", request.tokens)
    text = service.tokenizer.decode(request.tokens, from_start=True)
    return Response(msgspec.json.encode(Text(text)), media_type="application/json")
