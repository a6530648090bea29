"""From prompts to numbers: final hidden states or a classifier's scores, many prompts at a time.

Knows nothing of what the numbers are for or of how an answer is written.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgspec
import numpy as np

from persimmon.model.chat_prompt import ChatPrompt
from persimmon.server.engine.client import SequenceStream
from persimmon.server.engine.engines import EngineAccess
from persimmon.server.engine.messages import Pooling, Submit
from persimmon.server.http.endpoints.service import MAX_CHOICES, Service, expected_tokens
from persimmon.server.http.errors import bad_request, context_length_exceeded, generation_failed, given_up
from persimmon.server.http.generation.prompt_encoder import PromptInput
from persimmon.server.http.generation.prompt_images import PromptImages, cut_image
from persimmon.server.http.middleware.keys import salted
from persimmon.server.http.request_record import RequestRecord
from persimmon.server.http.schemas.pooling import PoolingRequest

MAX_RUNNING = 64
"""Inputs of one request that the engine has at a time.  So a long list does not hold up who comes after it, and short
ones still fill a step."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a request wants to know of, checked.

    Attributes:
        prompts: at least one, each of at least one token.
        record: of the request.
        images: of a single prompt that is a conversation; None where there are none.
    """

    prompts: Sequence[list[int]]
    record: RequestRecord
    images: PromptImages | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))


async def prepare(
    service: Service, request: PoolingRequest, record: RequestRecord, conversation: ChatPrompt | None = None
) -> Inputs:
    """Checks a request's inputs against the model and tokenizes them.

    Args:
        service: what the worker serves with.
        request: well-formed.
        record: of the request; what is found out is written into it.
        conversation: the only input, in place of the request's.

    Raises:
        ApiError: another model's name, too many inputs, an empty one or one that is too long, or a token id outside the
            vocabulary; or the server is full.
        EngineNotReadyError: the model is still loading.
        EngineDeadError: the engine has ended.
    """
    service.check_model(request.model)
    limit = service.max_model_len
    if len(request.input) > MAX_CHOICES:
        raise bad_request(f"input has {len(request.input)} entries; at most {MAX_CHOICES} are allowed.", "input")
    field = "input" if conversation is None else "messages"
    prompts: Sequence[PromptInput] = request.input if conversation is None else [conversation]
    image_tokens = 0 if conversation is None else conversation.num_image_tokens

    def fit(name: str, prompt: PromptInput, token_ids: list[int]) -> list[int]:
        shortened = request.shortened(token_ids, limit, "right")
        if image_tokens and len(shortened) < len(token_ids):
            raise cut_image(len(token_ids))
        if len(shortened) > limit:
            raise context_length_exceeded(len(shortened), 0, limit, name, image_tokens)
        return shortened

    at_once = prompts[:MAX_RUNNING]
    with service.gate.reserved(len(at_once), expected_tokens(at_once), record.owner):
        encoded = await service.encode_prompts(field, prompts, request.add_bos, fit)
    images = None if conversation is None else PromptImages.of(conversation, encoded[0][1], field)
    inputs = Inputs([token_ids for _, token_ids in encoded], record, images)
    record.prompt_tokens = inputs.num_tokens
    record.cache_salt = salted(record.cache_salt, request.cache_salt)
    if record.prompts is not None:
        record.prompts += request.input if conversation is None else [conversation.text(service.tokenizer)]
    return inputs


async def pooled(
    engine: EngineAccess,
    prompts: Iterable[list[int]],
    pooling: Pooling,
    width: int,
    record: RequestRecord,
    *,
    scores: bool = False,
    images: PromptImages | None = None,
) -> AsyncGenerator[np.ndarray, None]:
    """What the engine reports of each prompt, in their order.

    Closing it, like any error, aborts every prompt that still runs.

    Args:
        engine: computes them.
        prompts: token ids, at least one each.
        pooling: what to report, as `persimmon.server.engine.messages.Submit` has it.
        width: numbers of a row: the hidden size, or how many labels there are.
        record: of the request that they belong to.
        scores: whether rows are a classifier's scores instead of final hidden states.
        images: of the only prompt.

    Yields:
        [rows, width] float32.

    Raises:
        ApiError: the engine gave up one of the prompts, or its numbers are not finite.
        EngineDeadError: the engine has ended.
        EngineNotReadyError: the model is still loading.
    """
    waiting = iter(prompts)
    running: deque[SequenceStream] = deque()
    with contextlib.ExitStack() as stack:

        def start(count: int) -> None:
            for token_ids in islice(waiting, count):
                submit = Submit(
                    token_ids=token_ids,
                    spans=[] if images is None else images.spans,
                    max_tokens=0,
                    pooling=pooling,
                    scores=scores,
                    cache_salt=record.cache_salt,
                    request_id=record.request_id,
                    owner=record.owner,
                    weight=record.share,
                )
                running.extend(stack.enter_context(engine.submit(submit)))

        start(MAX_RUNNING)
        if images is not None:
            images.spans.clear()
        while running:
            yield await _rows(running.popleft(), width)
            start(1)


async def written(
    results: AsyncGenerator[np.ndarray, None], entry: Callable[[int, np.ndarray], msgspec.Struct]
) -> list[Any]:
    """An entry for each prompt, as a msgspec.Raw, which stands in an answer wherever the entry could.

    Args:
        results: of `pooled`; closed in the end.
        entry: makes an entry of a prompt's place and rows.
    """
    data: list[msgspec.Raw] = []
    async with contextlib.aclosing(results):
        async for rows in results:
            # One by one: thousands at once would hold up the other requests.
            data.append(msgspec.Raw(msgspec.json.encode(entry(len(data), rows))))
            await asyncio.sleep(0)
    return data


async def _rows(stream: SequenceStream, width: int) -> np.ndarray:
    parts = []
    async for output in stream:
        if output.finish_reason in ("error", "expired"):
            raise given_up(output.finish_reason, output.error)
        parts.append(output.pooled)
    rows = np.frombuffer(b"".join(parts), "<f4").reshape(-1, width)
    if not np.isfinite(rows).all():
        raise generation_failed("The model returned NaN or infinity for this input.")
    return rows
