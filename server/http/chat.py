"""POST /v1/chat/completions: from messages to a prompt, and how the answer is written, whole or streamed."""

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Sequence

import msgspec
from fastapi import Response
from msgspec import UNSET
from starlette.types import Receive

from model.chat_format import STOP, ChatFormatError, Turn, render
from server.http.disconnect import until_disconnect
from server.http.errors import bad_request
from server.http.generation import Generation, Piece, UsageCount
from server.http.protocol import ChatCompletionRequest
from server.http.protocol import ChatMessage as ChatMessageRequest
from server.http.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    TopLogprob,
)
from server.http.service import Service
from server.http.sse import DONE, EventStream, event
from server.http.token_report import TokenReport, TokenText


def chat_prompt(messages: Sequence[ChatMessageRequest]) -> str:
    """The conversation as the model reads it.

    Raises:
        ApiError: it is none: of a role that there is not, or without a last word of the user's.
    """
    try:
        return render([Turn(message.role, message.content) for message in messages])
    except ChatFormatError as error:
        raise bad_request(f"Invalid 'messages': {error}.", "messages") from None


async def create_chat_completion(
    service: Service, request: ChatCompletionRequest, receive: Receive, arrival: float
) -> Response:
    """The answer to a chat completion request.

    An answer ends at end-of-text and before a new human turn; ignore_eos lifts both.

    Args:
        service: what the worker serves with.
        request: well-formed.
        receive: the request's ASGI channel, its body read to the end.
        arrival: when the request came, on time.perf_counter's clock.

    Raises:
        ApiError: the request asks for what the model cannot do, or the engine gave it up.
        EngineNotReadyError: the model is still loading.
        EngineDeadError: the engine has ended.
        ClientDisconnect: the client went away before its answer was complete.
    """
    prompt = chat_prompt(request.messages)
    stop = request.stop if request.ignore_eos else [*request.stop, STOP]
    generation = await service.prepare(request, [prompt], stop, arrival)
    if request.stream:
        return EventStream(_stream(service, request, generation))
    body = await until_disconnect(receive, _whole(service, request, generation))
    return Response(body, media_type="application/json")


async def _whole(service: Service, request: ChatCompletionRequest, generation: Generation) -> bytes:
    created = int(time.time())
    answers, usage = await service.generator.answers(generation)
    choices = [
        ChatChoice(
            index,
            ChatMessage(answer.text),
            answer.finish_reason,
            _logprobs(answer.reports) if request.logprobs else None,
            token_ids=answer.token_ids if request.return_token_ids else UNSET,
        )
        for index, answer in enumerate(answers)
    ]
    return msgspec.json.encode(
        ChatCompletion(
            _new_id(),
            created,
            service.served_model_name,
            service.system_fingerprint,
            choices,
            usage,
            prompt_token_ids=generation.prompt_token_ids(0) if request.return_token_ids else UNSET,
        )
    )


async def _stream(
    service: Service, request: ChatCompletionRequest, generation: Generation
) -> AsyncGenerator[bytes, None]:
    identity = (_new_id(), int(time.time()), service.served_model_name, service.system_fingerprint)
    no_usage = None if request.include_usage else UNSET
    with_ids = request.return_token_ids
    begun: set[int] = set()

    def role_chunk(choice: int) -> bytes:
        choices = [ChatChunkChoice(choice, ChatDelta("assistant", ""))]
        prompt = generation.prompt_token_ids(0) if with_ids and not begun else UNSET
        begun.add(choice)
        return event(ChatCompletionChunk(*identity, choices, usage=no_usage, prompt_token_ids=prompt))

    def content_chunk(piece: Piece) -> bytes:
        delta = ChatDelta(content=piece.text)
        logprobs = _logprobs(piece.reports) if piece.reports else None
        token_ids = piece.token_ids if with_ids else UNSET
        choice = ChatChunkChoice(piece.choice, delta, logprobs=logprobs, token_ids=token_ids)
        return event(ChatCompletionChunk(*identity, [choice], usage=no_usage))

    def finish_chunk(piece: Piece) -> bytes:
        choice = ChatChunkChoice(piece.choice, ChatDelta(), piece.finish_reason)
        return event(ChatCompletionChunk(*identity, [choice], usage=no_usage))

    def chunks(piece: Piece) -> bytes:
        frames = b"" if piece.choice in begun else role_chunk(piece.choice)
        if piece.text or piece.reports or (with_ids and piece.token_ids):
            frames += content_chunk(piece)
        if piece.finish_reason is not None:
            frames += finish_chunk(piece)
        return frames

    count = UsageCount(generation)
    async with contextlib.aclosing(service.generator.run(generation)) as batches:
        async for batch in batches:
            count.add(batch)
            if frames := b"".join(map(chunks, batch)):
                yield frames
    if request.include_usage:
        yield event(ChatCompletionChunk(*identity, [], usage=count.usage)) + DONE
    else:
        yield DONE


def _logprobs(reports: Sequence[TokenReport]) -> ChatLogprobs:
    return ChatLogprobs(
        [
            ChatTokenLogprob(
                own.text.name,
                0.0 if own.logprob is None else own.logprob,
                _utf8(own.text),
                [TopLogprob(text.name, logprob, _utf8(text)) for text, logprob in own.top],
            )
            for own in reports
        ]
    )


def _utf8(text: TokenText) -> list[int] | None:
    return None if text.utf8 is None else list(text.utf8)


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"
