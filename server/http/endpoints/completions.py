"""POST /v1/completions: how the answer to prompts is written, whole or streamed."""

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Sequence

import msgspec
from msgspec import UNSET, UnsetType

from persimmon.server.http.endpoints.endpoint import Call
from persimmon.server.http.endpoints.preparation import prepare
from persimmon.server.http.endpoints.service import Service
from persimmon.server.http.generation.answer_form import AnswerForm
from persimmon.server.http.generation.generation import Generation
from persimmon.server.http.generation.pieces import Piece, UsageCount
from persimmon.server.http.generation.token_report import TokenReport
from persimmon.server.http.schemas.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from persimmon.server.http.schemas.usage import Usage
from persimmon.server.http.transport.disconnect import until_disconnect
from persimmon.server.http.transport.json_response import JsonResponse
from persimmon.server.http.transport.sse import DONE, EventStream, event


async def completions(
    service: Service, call: Call[CompletionRequest]
) -> JsonResponse[Completion] | EventStream[Completion]:
    """Continues one or more prompts."""
    request = call.request
    form = AnswerForm(request.constraint)
    generation = await prepare(service, request, request.prompt, request.stop, call.record, form)
    empty = Completion(
        id=f"cmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=service.served_model_name,
        system_fingerprint=service.system_fingerprint,
        choices=[],
    )
    if request.stream:
        return EventStream(_stream(service, request, generation, empty), service.gate.limits.ping_interval)
    return JsonResponse(await until_disconnect(call.receive, _whole(service, request, generation, empty)))


async def _whole(service: Service, request: CompletionRequest, generation: Generation, empty: Completion) -> Completion:
    answers, usage = await service.generator.answers(generation)
    with_ids = request.return_token_ids
    choices = [
        CompletionChoice(
            index=index,
            text=answer.text,
            finish_reason=answer.finish_reason,
            logprobs=_logprobs(answer.reports) if generation.logprobs is not None else None,
            token_ids=answer.token_ids if with_ids else UNSET,
            prompt_token_ids=generation.prompts[index // generation.n].token_ids if with_ids else UNSET,
        )
        for index, answer in enumerate(answers)
    ]
    return msgspec.structs.replace(empty, choices=choices, usage=usage)


async def _stream(
    service: Service, request: CompletionRequest, generation: Generation, empty: Completion
) -> AsyncGenerator[bytes, None]:
    identity = (empty.id, empty.created, empty.model, empty.system_fingerprint)
    count = UsageCount(generation)
    usage: Usage | UnsetType | None = None if request.include_usage else UNSET
    begun: set[int] = set()

    def chunk(piece: Piece) -> bytes:
        with_ids = request.return_token_ids and piece.token_ids
        if not (piece.text or piece.finish_reason or piece.reports or with_ids):
            return b""
        logprobs = _logprobs(piece.reports) if piece.reports else None
        choice = CompletionChoice(
            index=piece.choice, text=piece.text, finish_reason=piece.finish_reason, logprobs=logprobs
        )
        if request.return_token_ids:
            prompt = UNSET if piece.choice in begun else generation.prompt_token_ids(piece.choice)
            begun.add(piece.choice)
            choice = msgspec.structs.replace(choice, token_ids=piece.token_ids, prompt_token_ids=prompt)
        return event(Completion(*identity, [choice], usage=usage))

    async with contextlib.aclosing(service.generator.run(generation)) as batches:
        async for batch in batches:
            frames = b""
            for piece in batch:
                count.add(piece)
                if request.continuous_usage:
                    usage = count.usage
                frames += chunk(piece)
            if frames:
                yield frames
    if request.include_usage:
        yield event(msgspec.structs.replace(empty, usage=count.usage)) + DONE
    else:
        yield DONE


def _logprobs(reports: Sequence[TokenReport]) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[own.text.name for own in reports],
        token_logprobs=[own.logprob for own in reports],
        top_logprobs=[_top(own) for own in reports],
        text_offset=[own.offset for own in reports],
    )


def _top(own: TokenReport) -> dict[str, float] | None:
    """The token itself and the most probable ones; of several that read alike the most probable."""
    if own.logprob is None:
        return None
    top = {own.text.name: own.logprob}
    for text, logprob in own.top:
        top[text.name] = max(logprob, top.get(text.name, logprob))
    return top
