"""POST /v1/chat/completions: how the answer to a conversation is written, whole or streamed."""

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Sequence

from msgspec import UNSET, UnsetType

from persimmon.model.tool_calls import CallDelta, CallForm, begun_call
from persimmon.server.http.endpoints.endpoint import Call
from persimmon.server.http.endpoints.preparation import prepare
from persimmon.server.http.endpoints.service import Service
from persimmon.server.http.generation.answer_form import chat_form
from persimmon.server.http.generation.conversation import chat_prompt
from persimmon.server.http.generation.generation import Generation
from persimmon.server.http.generation.pieces import Answer, Piece, UsageCount
from persimmon.server.http.generation.token_report import TokenReport, TokenText
from persimmon.server.http.schemas.chat import (
    CalledFunction,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    ChatToolCall,
    FunctionDelta,
    ToolCallDelta,
    TopLogprob,
)
from persimmon.server.http.schemas.usage import Usage
from persimmon.server.http.transport.disconnect import until_disconnect
from persimmon.server.http.transport.json_response import JsonResponse
from persimmon.server.http.transport.sse import DONE, EventStream, event


async def chat_completions(
    service: Service, call: Call[ChatCompletionRequest]
) -> JsonResponse[ChatCompletion] | EventStream[ChatCompletionChunk]:
    """Answers the last message of a conversation.

    An answer ends at end-of-text and, in Adept's format, before a new human turn; ignore_eos lifts both.  An answer
    that follows a grammar ends where the grammar allows it.
    """
    request = call.request
    generation = await _prepared(service, call)
    if request.stream:
        return EventStream(_stream(service, request, generation), service.gate.limits.ping_interval)
    return JsonResponse(await until_disconnect(call.receive, _whole(service, request, generation)))


async def _prepared(service: Service, call: Call[ChatCompletionRequest]) -> Generation:
    """What the request asks for.  A function of its own, which forgets the images' pixels when the engine has them."""
    request = call.request
    form = chat_form(request)
    chat = service.chat
    tools = request.tools if form.calls is not None else ()
    service.check_model(request.model)
    images = await service.load_images(request.messages, call.receive)
    prompt = await chat_prompt(chat, request.messages, tools, request.chat_template_kwargs, images)
    if form.calls is not None and form.calls.begun is not None:
        begun = begun_call(form.calls.begun)
        prompt = prompt.followed_by(begun if chat.leading_space else begun.lstrip())
    goes_on = request.ignore_eos and not form.ends_by_grammar
    # JSON and other enforced text may contain what would otherwise be a new turn.
    turn_end = chat.stop if form.may_be_text and not goes_on else ()
    return await prepare(service, request, [prompt], [*request.stop, *turn_end], call.record, form)


async def _whole(service: Service, request: ChatCompletionRequest, generation: Generation) -> ChatCompletion:
    created = int(time.time())
    answers, usage = await service.generator.answers(generation)
    choices = [
        ChatChoice(
            index=index,
            message=_message(answer, generation.calls),
            finish_reason=answer.finish_reason,
            logprobs=_logprobs(answer.reports) if request.logprobs else None,
            token_ids=answer.token_ids if request.return_token_ids else UNSET,
        )
        for index, answer in enumerate(answers)
    ]
    return ChatCompletion(
        id=_new_id(),
        created=created,
        model=service.served_model_name,
        system_fingerprint=service.system_fingerprint,
        choices=choices,
        usage=usage,
        service_tier=_tier(request),
        prompt_token_ids=generation.prompt_token_ids(0) if request.return_token_ids else UNSET,
    )


def _message(answer: Answer, form: CallForm | None) -> ChatMessage:
    if not answer.calls:
        # Calls that never began, because the answer was too short, are not content either.
        return ChatMessage(None if form is not None and form.forced else answer.text)
    calls = [ChatToolCall(_call_id(), CalledFunction(call.name, call.arguments)) for call in answer.calls]
    return ChatMessage(None, tool_calls=calls)


async def _stream(
    service: Service, request: ChatCompletionRequest, generation: Generation
) -> AsyncGenerator[bytes, None]:
    identity = (_new_id(), int(time.time()), service.served_model_name, service.system_fingerprint)
    tier = _tier(request)
    count = UsageCount(generation)
    usage: Usage | UnsetType | None = None if request.include_usage else UNSET
    with_ids = request.return_token_ids
    begun = False
    forced = generation.calls is not None and generation.calls.forced

    def role_chunk(choice: int) -> bytes:
        choices = [ChatChunkChoice(choice, ChatDelta("assistant", None if forced else ""))]
        prompt = generation.prompt_token_ids(0) if with_ids and choice == 0 else UNSET
        return event(
            ChatCompletionChunk(*identity, choices=choices, usage=usage, service_tier=tier, prompt_token_ids=prompt)
        )

    def piece_chunks(piece: Piece) -> bytes:
        """What a piece adds; the first chunk reports its tokens."""
        deltas = [ChatDelta(tool_calls=[_call_delta(call)]) for call in piece.calls]
        if piece.text or not (deltas or forced):
            deltas.insert(0, ChatDelta(content=piece.text))
        logprobs = _logprobs(piece.reports) if piece.reports else None
        token_ids = piece.token_ids if with_ids else UNSET
        frames = b""
        for delta in deltas or [ChatDelta()]:
            choice = ChatChunkChoice(piece.choice, delta, logprobs=logprobs, token_ids=token_ids)
            frames += event(ChatCompletionChunk(*identity, choices=[choice], usage=usage, service_tier=tier))
            logprobs, token_ids = None, UNSET
        return frames

    def finish_chunk(piece: Piece) -> bytes:
        choice = ChatChunkChoice(piece.choice, ChatDelta(), piece.finish_reason)
        return event(ChatCompletionChunk(*identity, choices=[choice], usage=usage, service_tier=tier))

    def chunks(piece: Piece) -> bytes:
        frames = b""
        if piece.text or piece.calls or piece.reports or (with_ids and piece.token_ids):
            frames += piece_chunks(piece)
        if piece.finish_reason is not None:
            frames += finish_chunk(piece)
        return frames

    async with contextlib.aclosing(service.generator.run(generation)) as batches:
        async for batch in batches:
            frames = b""
            if not begun:
                begun = True
                usage = count.usage if request.continuous_usage else usage
                # Of all choices, in order: OpenAI's client makes room for each as it first comes.
                frames = b"".join(map(role_chunk, range(generation.choices)))
            for piece in batch:
                count.add(piece)
                if request.continuous_usage:
                    usage = count.usage
                frames += chunks(piece)
            if frames:
                yield frames
    if request.include_usage:
        yield event(ChatCompletionChunk(*identity, choices=[], usage=count.usage, service_tier=tier)) + DONE
    else:
        yield DONE


def _tier(request: ChatCompletionRequest) -> str | UnsetType:
    return UNSET if request.service_tier is None else "default"


def _call_delta(call: CallDelta) -> ToolCallDelta:
    if call.name is None:
        return ToolCallDelta(index=call.index, function=FunctionDelta(arguments=call.arguments))
    function = FunctionDelta(call.name, call.arguments)
    return ToolCallDelta(index=call.index, id=_call_id(), type="function", function=function)


def _logprobs(reports: Sequence[TokenReport]) -> ChatLogprobs:
    return ChatLogprobs(
        [
            ChatTokenLogprob(
                token=own.text.name,
                logprob=0.0 if own.logprob is None else own.logprob,
                bytes=_utf8(own.text),
                top_logprobs=[TopLogprob(text.name, logprob, _utf8(text)) for text, logprob in own.top],
            )
            for own in reports
        ]
    )


def _utf8(text: TokenText) -> list[int] | None:
    return None if text.utf8 is None else list(text.utf8)


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"
