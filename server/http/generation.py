"""From the engine's tokens to the text that clients see: one prompt or many, one sample of each or several.

Knows nothing of HTTP bodies or how an answer is written.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import msgspec

from model.chat_format import AnswerText
from model.tokenizer import IncrementalDetokenizer, Tokenizer
from server.engine.client import EngineClient
from server.engine.messages import Sampling, SequenceOutput
from server.http.errors import generation_failed
from server.http.responses import PromptTokensDetails, Usage
from server.http.stop_strings import StopChecker, StopStrings
from server.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and what to generate for it.

    Attributes:
        token_ids: at least one.
        max_tokens: new tokens per sample, at most.
        sampling: of the prompt's first sample; the others differ in their sample_index alone.
    """

    token_ids: list[int]
    max_tokens: int
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Generation:
    """A request as the engine will see it, checked.

    Attributes:
        prompts: at least one.
        n: samples of each prompt.
        stop_token_ids: tokens that end a sample and are no part of its text.
        stop_strings: strings that end a sample and are no part of its text.
        is_chat: whether the text is an answer in the chat format.
        arrival: when the request came, on time.perf_counter's clock.
    """

    prompts: list[Prompt]
    n: int
    stop_token_ids: list[int]
    stop_strings: StopStrings
    is_chat: bool
    arrival: float

    @property
    def choices(self) -> int:
        """Samples in all; choice prompt_index * n + sample_index is a prompt's sample."""
        return len(self.prompts) * self.n

    def prompt_token_ids(self, choice: int) -> list[int]:
        """The tokens of the prompt that a choice continues."""
        return self.prompts[choice // self.n].token_ids


class Piece(msgspec.Struct, frozen=True):
    """What one output of the engine adds to one choice.

    Attributes:
        choice: its index.
        text: new text, certain not to be part of a stop string; perhaps empty.
        token_ids: new tokens, a stop token included, none after the one that completed a stop string.
        finish_reason: "stop" or "length" with the last piece, else None.
        cached_tokens: prompt tokens that came from the prefix cache.
    """

    choice: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    cached_tokens: int


@dataclass(slots=True)
class Answer:
    """A whole choice, gathered from its pieces."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        """Takes the choice's next piece."""
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.finish_reason = piece.finish_reason


class UsageCount:
    """Counts the tokens of a request while its pieces come."""

    def __init__(self, generation: Generation) -> None:
        self._samples = generation.n
        self._prompt_tokens = sum(len(prompt.token_ids) for prompt in generation.prompts)
        self._completion_tokens = 0
        self._cached_tokens = [0] * len(generation.prompts)

    def add(self, pieces: Sequence[Piece]) -> None:
        """Takes the next pieces, of any choices."""
        for piece in pieces:
            self._completion_tokens += len(piece.token_ids)
            prompt, sample = divmod(piece.choice, self._samples)
            if sample == 0:  # the others find the blocks of the first one
                self._cached_tokens[prompt] = piece.cached_tokens

    @property
    def usage(self) -> Usage:
        """The count so far."""
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=self._prompt_tokens + self._completion_tokens,
            prompt_tokens_details=PromptTokensDetails(sum(self._cached_tokens)),
        )


class SampleText:
    """The text of one sample: what its tokens say, up to where it ends.

    Args:
        choice: the sample's index among the request's choices.
        detokenizer: a new one.
        stop: a new checker.
        answer: takes the chat format's own space off; None for a text that is no chat answer.
    """

    def __init__(
        self,
        choice: int,
        detokenizer: IncrementalDetokenizer,
        stop: StopChecker,
        answer: AnswerText | None = None,
    ) -> None:
        self._choice = choice
        self._detokenizer = detokenizer
        self._stop = stop
        self._answer = answer

    def push(self, output: SequenceOutput) -> Piece:
        """Takes the engine's next output, which is no error."""
        ended = output.finish_reason
        readable = output.token_ids[:-1] if ended == "stop" else output.token_ids
        text = ""
        # One by one, since a stop string may be complete before the last token of several.
        for count, token_id in enumerate(readable, 1):
            text += self._visible(self._detokenizer.push((token_id,)))
            if self._stop.matched:
                return Piece(self._choice, text, readable[:count], "stop", output.cached_tokens)
        if ended is not None:
            text += self._visible(self._detokenizer.finish())
            text += self._stop.finish()
            ended = "stop" if self._stop.matched else ended
        return Piece(self._choice, text, output.token_ids, ended, output.cached_tokens)

    def _visible(self, text: str) -> str:
        return self._stop.push(text if self._answer is None else self._answer.push(text))


class Generator:
    """Runs generations on the engine.

    Args:
        engine: where sequences run.
        tokenizer: of the served model.
        metrics: where latencies are recorded.
    """

    def __init__(self, engine: EngineClient, tokenizer: Tokenizer, metrics: Metrics) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._metrics = metrics

    async def run(self, generation: Generation) -> AsyncGenerator[list[Piece], None]:
        """The pieces of all choices as they come, those that are there together in one list.

        Closing it, like any error, aborts every sequence that still runs.

        Raises:
            ApiError: the engine gave up one of the sequences.
            EngineDeadError: the engine has ended.
            EngineNotReadyError: the model is still loading.
        """
        if generation.choices == 1:
            async with contextlib.aclosing(self._sample(generation, 0)) as pieces:
                async for piece in pieces:
                    yield [piece]
            return
        samples = [self._sample(generation, choice) for choice in range(generation.choices)]
        async with contextlib.aclosing(_merged(samples)) as batches:
            async for batch in batches:
                yield batch

    async def answers(self, generation: Generation) -> tuple[list[Answer], Usage]:
        """All choices, whole, and what they took.

        Raises:
            ApiError, EngineDeadError, EngineNotReadyError: as `run` does.
        """
        answers = [Answer() for _ in range(generation.choices)]
        count = UsageCount(generation)
        async with contextlib.aclosing(self.run(generation)) as batches:
            async for batch in batches:
                count.add(batch)
                for piece in batch:
                    answers[piece.choice].add(piece)
        return answers, count.usage

    async def _sample(self, generation: Generation, choice: int) -> AsyncGenerator[Piece, None]:
        prompt_index, sample_index = divmod(choice, generation.n)
        prompt = generation.prompts[prompt_index]
        sampling = prompt.sampling
        if sample_index:
            sampling = msgspec.structs.replace(sampling, sample_index=sample_index)
        sample = SampleText(
            choice,
            self._tokenizer.detokenizer(),
            StopChecker(generation.stop_strings),
            AnswerText() if generation.is_chat else None,
        )
        latency, last = self._metrics.time_to_first_token, generation.arrival
        with self._engine.submit(prompt.token_ids, prompt.max_tokens, generation.stop_token_ids, sampling) as outputs:
            async for output in outputs:
                if output.finish_reason == "error":
                    raise generation_failed(output.error)
                now = time.perf_counter()
                latency.observe(now - last)
                latency, last = self._metrics.inter_token_latency, now
                piece = sample.push(output)
                yield piece
                if piece.finish_reason is not None:
                    return


async def _merged(sources: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[list[Piece], None]:
    """The items of several generators as they come; the first error of one ends them all."""
    arrived: asyncio.Queue[Piece | asyncio.Task[None]] = asyncio.Queue()

    async def forward(source: AsyncGenerator[Piece, None]) -> None:
        async with contextlib.aclosing(source) as pieces:
            async for piece in pieces:
                arrived.put_nowait(piece)

    tasks = [asyncio.create_task(forward(source)) for source in sources]
    for task in tasks:
        task.add_done_callback(arrived.put_nowait)
    running = len(tasks)
    try:
        while running:
            items = [await arrived.get()]
            while not arrived.empty():
                items.append(arrived.get_nowait())
            pieces = []
            for item in items:
                if isinstance(item, Piece):
                    pieces.append(item)
                else:
                    running -= 1
                    item.result()
            if pieces:
                yield pieces
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
