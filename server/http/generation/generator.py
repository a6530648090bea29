"""Runs what a request asks for on the engine: the pieces of all its samples as they come, or whole answers.

Knows nothing of HTTP bodies or how an answer is written.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Self

import msgspec

from persimmon.model.token_logprobs import TokenLogprobs
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.client import SequenceStream
from persimmon.server.engine.engines import EngineAccess
from persimmon.server.engine.load import Load
from persimmon.server.http.errors import given_up
from persimmon.server.http.generation.generation import Generation, Prompt
from persimmon.server.http.generation.pieces import Answer, Piece, UsageCount
from persimmon.server.http.generation.sample_text import SampleText
from persimmon.server.http.generation.slices import in_slices
from persimmon.server.http.request_record import RequestRecord
from persimmon.server.http.schemas.usage import Usage
from persimmon.server.metrics import Metrics
from persimmon.server.sequence_metrics import FinishedSequence

_BEGUN_AT_ONCE = 32
"""Sequences that begin, or are cancelled, before other requests have a turn: two or three milliseconds' work."""


class _PromptReport:
    """What the samples of one prompt share.

    Args:
        samples: how many there are.

    Attributes:
        logprobs: of the prompt, which the engine reports to the first sample.
        known: set when all of that has come.
    """

    def __init__(self, samples: int) -> None:
        self.logprobs: list[TokenLogprobs] = []
        self.known = asyncio.Event()
        self._unfinished = self._samples = samples
        self._most_generated = 0

    def count_finished(self, generated: int, metrics: Metrics) -> None:
        """Records the samples once the last one has ended by itself.

        Args:
            generated: tokens of a sample that has ended.
            metrics: where they are recorded.
        """
        self._most_generated = max(self._most_generated, generated)
        self._unfinished -= 1
        if self._unfinished == 0:
            metrics.observe_samples(self._samples, self._most_generated)


class _Unsubmitted:
    """Keeps room in the server for those prompts of a request that are still to be submitted.

    Args:
        load: where it is counted.
        generation: the request.
    """

    def __init__(self, load: Load, generation: Generation) -> None:
        self._load = load
        self._owner = generation.record.owner
        self._samples = generation.samples
        self._sequences = generation.choices
        self._tokens = sum([len(prompt.token_ids) for prompt in generation.prompts])

    def __enter__(self) -> Self:
        self._load.add(self._sequences, self._tokens, self._owner)
        return self

    def __exit__(self, *_: object) -> None:
        self._release(self._sequences, self._tokens)

    def take(self, prompt: Prompt) -> None:
        """Keeps no more room for a prompt, which is submitted next."""
        self._release(self._samples, len(prompt.token_ids))

    def _release(self, sequences: int, tokens: int) -> None:
        self._sequences -= sequences
        self._tokens -= tokens
        self._load.add(-sequences, -tokens, self._owner)


@dataclass(slots=True)
class _Ending:
    """Why a sequence ends: "abort" until it is known."""

    reason: str = "abort"


class Generator:
    """Runs generations on the engine.

    Args:
        engine: where sequences run.
        tokenizer: of the served model.
        metrics: where latencies are recorded.
    """

    def __init__(self, engine: EngineAccess, tokenizer: Tokenizer, metrics: Metrics) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._metrics = metrics

    async def run(self, generation: Generation) -> AsyncGenerator[list[Piece], None]:
        """The pieces of all choices as they come, those that are there together in one list, by choice.

        Closing it, like any error, aborts every sequence that still runs.

        Raises:
            ApiError: the engine gave up one of the sequences.
            EngineDeadError: the engine has ended.
            EngineNotReadyError: the model is still loading.
        """
        with contextlib.ExitStack() as stack, _Unsubmitted(self._engine.load, generation) as unsubmitted:
            samples: list[AsyncGenerator[Piece, None]] = []
            async for prompt in in_slices(generation.prompts, _BEGUN_AT_ONCE, cost=lambda prompt: generation.samples):
                prompt_report = _PromptReport(generation.samples)
                unsubmitted.take(prompt)
                streams = stack.enter_context(self._engine.submit(generation.submission(prompt)))
                if prompt.images is not None:
                    prompt.images.spans.clear()
                each = generation.samples // len(streams)
                for stream in streams:
                    sample = self._sample(generation, each * len(samples), stream, prompt, prompt_report)
                    samples.append(sample if each == 1 else _repeated(sample, each))
            if len(samples) == 1:
                async with contextlib.aclosing(samples[0]) as pieces:
                    async for piece in pieces:
                        yield [piece]
                return
            async with contextlib.aclosing(_merged(samples)) as batches:
                async for batch in batches:
                    yield batch

    async def answers(self, generation: Generation) -> tuple[list[Answer], Usage]:
        """All answers, whole, and what they took; of more samples than answers the most probable ones, best first.

        Raises:
            ApiError, EngineDeadError, EngineNotReadyError: as `run` does.
        """
        answers = [Answer() for _ in range(generation.choices)]
        count = UsageCount(generation)
        async with contextlib.aclosing(self.run(generation)) as batches:
            async for batch in batches:
                for piece in batch:
                    count.add(piece)
                    answers[piece.choice].add(piece)
        if generation.samples > generation.n:
            samples = generation.samples
            of_each_prompt = [answers[begin : begin + samples] for begin in range(0, len(answers), samples)]
            answers = [
                answer
                for own in of_each_prompt
                for answer in sorted(own, key=lambda sample: sample.mean_logprob, reverse=True)[: generation.n]
            ]
        return answers, count.usage

    async def _sample(
        self,
        generation: Generation,
        choice: int,
        stream: SequenceStream,
        prompt: Prompt,
        prompt_report: _PromptReport,
    ) -> AsyncGenerator[Piece, None]:
        sample = SampleText(
            choice=choice,
            tokenizer=self._tokenizer,
            generation=generation,
            min_tokens=prompt.sampling.min_tokens,
            images=prompt.images,
        )
        record = generation.record
        latency, last = self._metrics.time_to_first_token, record.arrival
        submitted = time.perf_counter()
        first = 0.0
        generated = 0
        begun = False
        with contextlib.closing(stream), self._ending(record) as ending:
            async for output in stream:
                if output.finish_reason in ("error", "expired"):
                    raise given_up(output.finish_reason, output.error)
                prompt_report.logprobs += output.prompt_logprobs
                if record.queue_seconds is None:
                    record.queue_seconds = output.queue_seconds
                if not output.token_ids and output.finish_reason is None:
                    continue
                if not begun:
                    begun = True
                    self._metrics.queue_time.observe(output.queue_seconds)
                    if choice % generation.samples == 0:
                        prompt_report.known.set()
                        record.cached_tokens += output.cached_tokens
                        self._metrics.count_prompt(len(prompt.token_ids), output.cached_tokens)
                    if generation.echo:
                        await prompt_report.known.wait()
                        for _ in sample.echo(prompt.token_ids, prompt_report.logprobs):
                            await asyncio.sleep(0)  # so that other streams go on
                now = time.perf_counter()
                first = first or now
                latency.observe(now - last)
                latency, last = self._metrics.inter_token_latency, now
                if record.first_token is None:
                    record.first_token = now
                piece = sample.push(output)
                generated += len(piece.token_ids)
                record.output_tokens += len(piece.token_ids)
                if piece.finish_reason is not None:
                    ending.reason = piece.finish_reason
                    self._metrics.observe_sequence(
                        FinishedSequence(
                            prompt_tokens=len(prompt.token_ids),
                            cached_tokens=output.cached_tokens,
                            generated_tokens=generated,
                            max_tokens=prompt.max_tokens,
                            scheduled=min(submitted + output.queue_seconds, first),
                            first_token=first,
                            last_token=now,
                        )
                    )
                    prompt_report.count_finished(generated, self._metrics)
                yield piece
                if piece.finish_reason is not None:
                    return

    @contextlib.contextmanager
    def _ending(self, record: RequestRecord) -> Iterator[_Ending]:
        """Counts how a sequence ends, however its block is left."""
        ending = _Ending()
        try:
            yield ending
        except Exception:
            ending.reason = "error"
            raise
        finally:
            record.finish_reasons[ending.reason] += 1
            # A call of tools is an answer that has stopped, to those who count sequences.
            counted = "stop" if ending.reason == "tool_calls" else ending.reason
            self._metrics.sequences_finished.labels(counted).inc()


async def _repeated(source: AsyncGenerator[Piece, None], count: int) -> AsyncGenerator[Piece, None]:
    """The pieces of one choice, repeated for `count` choices from that one on."""
    async with contextlib.aclosing(source) as pieces:
        async for piece in pieces:
            for index in range(count):
                yield msgspec.structs.replace(piece, choice=piece.choice + index)


_choice = attrgetter("choice")


async def _merged(sources: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[list[Piece], None]:
    """The items of several generators as they come; the first error of one ends them all."""
    arrived: asyncio.Queue[Piece | asyncio.Task[None]] = asyncio.Queue()

    async def forward(source: AsyncGenerator[Piece, None]) -> None:
        async with contextlib.aclosing(source) as pieces:
            async for piece in pieces:
                arrived.put_nowait(piece)

    tasks: list[asyncio.Task[None]] = []
    running = len(sources)
    try:
        async for source in in_slices(sources, _BEGUN_AT_ONCE):
            task = asyncio.create_task(forward(source))
            task.add_done_callback(arrived.put_nowait)
            tasks.append(task)
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
                pieces.sort(key=_choice)
                yield pieces
    finally:
        async for task in in_slices([task for task in tasks if not task.done()], _BEGUN_AT_ONCE):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
