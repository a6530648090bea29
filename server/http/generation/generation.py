"""From the engine's tokens to the text that clients see: one prompt or many, one sample of each or several.

Knows nothing of HTTP bodies or how an answer is written.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

import msgspec

from persimmon.model.chat_format import AnswerText
from persimmon.model.token_logprobs import TokenLogprobs
from persimmon.model.tokenizer import Tokenizer
from persimmon.model.tool_calls import CallDelta, CallForm, CallReader, ToolCall
from persimmon.server.engine.client import EngineClient, SequenceStream
from persimmon.server.engine.messages import Sampling, SequenceOutput, Submit
from persimmon.server.http.errors import given_up
from persimmon.server.http.generation.stop_strings import StopChecker, StopStrings
from persimmon.server.http.generation.token_report import ReportQueue, TokenReport, read_prompt, report
from persimmon.server.http.request_record import RequestRecord
from persimmon.server.http.schemas.responses import PromptTokensDetails, Usage
from persimmon.server.metrics import Metrics
from persimmon.server.sequence_metrics import FinishedSequence

_ECHOED_AT_ONCE = 256
"""Prompt tokens that are read at once: with five alternatives each, some milliseconds."""


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
        n: answers to each prompt.
        samples: of each prompt, of which the n most probable are the answers; n of them or more.
        stop_token_ids: tokens that end a sample and are no part of its text.
        stop_strings: strings that end a sample and are no part of its text.
        is_chat: whether the text is an answer in a conversation.
        echo: whether a sample's text begins with its prompt's.
        logprobs: how many of the most probable tokens to report beside each token; None reports no tokens.
        record: of the request; what its sequences come to is written into it.
        calls: which tools an answer may call; None where its text is no call whatever it says.
        priority: requests of a lower one go first.
        begins_with_space: whether a chat's answer begins with a space that belongs to the format.
    """

    prompts: list[Prompt]
    n: int
    samples: int
    stop_token_ids: list[int]
    stop_strings: StopStrings
    is_chat: bool
    echo: bool
    logprobs: int | None
    record: RequestRecord
    calls: CallForm | None = None
    priority: int = 0
    begins_with_space: bool = True

    @property
    def choices(self) -> int:
        """Samples in all; choice prompt_index * samples + sample_index is a prompt's sample."""
        return len(self.prompts) * self.samples

    def prompt_token_ids(self, choice: int) -> list[int]:
        """The tokens of the prompt that a choice continues."""
        return self.prompts[choice // self.samples].token_ids

    def submission(self, prompt: Prompt) -> Submit:
        """What the engine is to do for one of the prompts."""
        return Submit(
            token_ids=prompt.token_ids,
            max_tokens=prompt.max_tokens,
            stop_token_ids=self.stop_token_ids,
            sampling=prompt.sampling,
            samples=self.samples if prompt.max_tokens else 1,  # without new tokens all samples are the same
            prompt_logprobs=self.logprobs if self.echo else None,
            priority=self.priority,
            cache_salt=self.record.cache_salt,
            request_id=self.record.request_id,
            owner=self.record.owner,
            weight=self.record.share,
        )


class Piece(msgspec.Struct, frozen=True):
    """What one output of the engine adds to one choice.

    Attributes:
        choice: its index.
        text: new text, certain not to be part of a stop string or of a call; perhaps empty.
        token_ids: new tokens, a stop token included, none after the one that completed a stop string or the calls.
        finish_reason: "stop", "length" or "tool_calls" with the last piece, else None.
        cached_tokens: prompt tokens that came from the prefix cache.
        reports: tokens, one after the other, whose text is certain now, where the request asked for reports.  In a
            completion all of them come in the end; in a chat those that are no part of the text do not.
        logprob: the sum of the new tokens' log-probabilities, where the engine reported them.
        calls: what is added to the calls of tools.
    """

    choice: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    cached_tokens: int
    reports: list[TokenReport] = []
    logprob: float = 0.0
    calls: list[CallDelta] = []


@dataclass(slots=True)
class Answer:
    """A whole choice, gathered from its pieces."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    reports: list[TokenReport] = field(default_factory=list)
    logprob: float = 0.0
    calls: list[ToolCall] = field(default_factory=list)

    @property
    def mean_logprob(self) -> float:
        """How probable its tokens were, for one of them; lowest where there is none."""
        return self.logprob / len(self.token_ids) if self.token_ids else -math.inf

    def add(self, piece: Piece) -> None:
        """Takes the choice's next piece."""
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.finish_reason = piece.finish_reason
        self.reports += piece.reports
        self.logprob += piece.logprob
        for delta in piece.calls:
            if delta.name is not None:
                self.calls.append(ToolCall(delta.name, delta.arguments))
            else:
                call = self.calls[delta.index]
                self.calls[delta.index] = replace(call, arguments=call.arguments + delta.arguments)


class UsageCount:
    """Counts the tokens of a request while its pieces come."""

    def __init__(self, generation: Generation) -> None:
        self._samples = generation.samples
        self._prompt_tokens = sum(len(prompt.token_ids) for prompt in generation.prompts)
        self._completion_tokens = 0
        self._cached_tokens = [0] * len(generation.prompts)

    def add(self, piece: Piece) -> None:
        """Takes the next piece of any choice."""
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
        tokenizer: of the served model.
        generation: the request.
        min_tokens: stop strings are looked for in what comes after so many tokens.
    """

    def __init__(self, choice: int, tokenizer: Tokenizer, generation: Generation, min_tokens: int = 0) -> None:
        self._choice = choice
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer()
        self._stop = StopChecker(generation.stop_strings)
        # Takes the chat format's own space off.
        self._answer = AnswerText() if generation.is_chat and generation.begins_with_space else None
        self._calls = None if generation.calls is None else CallReader(generation.calls)
        # OpenAI says "stop" where the request names the function.
        self._says_tool_calls = generation.calls is not None and generation.calls.begun is None
        # Stop strings do not cut calls that a grammar enforces, only the text that may come instead of them.
        self._stops_content = generation.calls is not None and generation.calls.enforced
        self._call_deltas: list[CallDelta] = []
        self._reports = ReportQueue() if generation.logprobs is not None else None
        self._keeps_all_reports = not generation.is_chat
        self._unstoppable = min_tokens
        self._begin = ""
        self._length = 0  # characters of the text, those that are held back included
        self._shown = 0

    def echo(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> Iterator[None]:
        """Puts the prompt before the text; before any output.  Now and then it yields: a long prompt takes a while.

        Args:
            token_ids: the prompt's.
            logprobs: of its tokens but the first, or none.
        """
        texts = []
        prompt = read_prompt(self._tokenizer, self._detokenizer, token_ids)
        for place, (token_id, text, prefix) in enumerate(prompt):
            own = logprobs[place - 1] if 0 < place <= len(logprobs) else None
            self._note(token_id, own, prefix)
            texts.append(text)
            self._length += len(text)
            if place % _ECHOED_AT_ONCE == _ECHOED_AT_ONCE - 1:
                yield
        self._begin = "".join(texts)

    def push(self, output: SequenceOutput) -> Piece:
        """Takes the engine's next output, which is no error."""
        ended = output.finish_reason
        readable = output.token_ids[:-1] if ended == "stop" else output.token_ids
        text, self._begin = self._begin, ""
        self._shown += len(text)
        logprobs: Sequence[TokenLogprobs | None] = output.logprobs or [None] * len(output.token_ids)
        # One by one, since a stop string may be complete before the last token of several.
        for count, (token_id, own) in enumerate(zip(readable, logprobs, strict=False), 1):
            text += self._read(token_id, own)
            if self._is_over:
                return self._piece(text, output, count, "stop")
        if ended is not None:
            if ended == "stop":
                self._note(output.token_ids[-1], logprobs[-1], "")
            text += self._finish(self._without_format(self._detokenizer.finish())[0])
            ended = "stop" if self._is_over else ended
        return self._piece(text, output, len(output.token_ids), ended)

    def _read(self, token_id: int, logprobs: TokenLogprobs | None) -> str:
        """What is certain of the text after one more token."""
        text, prefix = self._detokenizer.push((token_id,)), ""
        if self._answer is not None:
            text, prefix = self._without_format(text)
        if self._reports is not None:
            self._note(token_id, logprobs, prefix)
        self._length += len(text)
        if self._unstoppable:
            self._unstoppable -= 1
            return self._content(text)
        if self._stops_content:
            return self._stop_content(self._content(text))
        return self._content(self._stop.push(text))

    def _finish(self, text: str) -> str:
        """What is certain of the text once it has ended, with its last piece."""
        if self._calls is not None and self._stops_content:
            certain = self._stop_content(self._content(text) + self._calls.finish())
            held = self._stop.finish()
            self._shown += len(held)
            return certain + held
        return self._content(self._stop.push(text)) + self._content(self._stop.finish())

    def _stop_content(self, content: str) -> str:
        """What is certain of content that stop strings may end."""
        certain = self._stop.push(content)
        self._shown += len(certain) - len(content)
        return certain

    def _content(self, text: str) -> str:
        """What is certain to be content of a text that is certain; what adds to calls is kept for the piece."""
        self._shown += len(text)
        if self._calls is None:
            return text
        content, deltas = self._calls.push(text)
        self._call_deltas += deltas
        return content

    @property
    def _is_over(self) -> bool:
        """Whether the text has ended by itself, whatever the engine says."""
        return self._stop.matched or (self._calls is not None and self._calls.ended)

    def _without_format(self, text: str) -> tuple[str, str]:
        """A text without what the chat format puts before it, and that."""
        if self._answer is None:
            return text, ""
        answer = self._answer.push(text)
        return answer, text[: len(text) - len(answer)]

    def _note(self, token_id: int, logprobs: TokenLogprobs | None, prefix: str) -> None:
        if self._reports is not None:
            own = report(self._tokenizer, token_id, self._length, logprobs)
            self._reports.add([own.without_prefix(prefix) if prefix else own])

    def _piece(self, text: str, output: SequenceOutput, count: int, ended: str | None) -> Piece:
        if self._calls is not None and ended is not None:
            text += self._calls.finish()
            if ended == "stop" and self._calls.has_whole_calls and self._says_tool_calls:
                ended = "tool_calls"
        token_ids = output.token_ids[:count]
        if not output.logprobs and self._reports is None and self._calls is None:
            return Piece(self._choice, text, token_ids, ended, output.cached_tokens)
        calls, self._call_deltas = self._call_deltas, []
        reports: list[TokenReport] = []
        if self._reports is not None:
            reports = self._reports.visible(self._shown)
            if ended is not None and self._keeps_all_reports:
                reports += self._reports.rest()
        logprob = sum(own.logprob for own in output.logprobs[:count])
        return Piece(self._choice, text, token_ids, ended, output.cached_tokens, reports, logprob, calls)


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


@dataclass(slots=True)
class _Ending:
    """Why a sequence ends: until it is known, because nobody wants the rest."""

    reason: str = "abort"


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
        """The pieces of all choices as they come, those that are there together in one list, by choice.

        Closing it, like any error, aborts every sequence that still runs.

        Raises:
            ApiError: the engine gave up one of the sequences.
            EngineDeadError: the engine has ended.
            EngineNotReadyError: the model is still loading.
        """
        with contextlib.ExitStack() as stack:
            samples: list[AsyncGenerator[Piece, None]] = []
            for prompt in generation.prompts:
                prompt_report = _PromptReport(generation.samples)
                streams = stack.enter_context(self._engine.submit(generation.submission(prompt)))
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
        sample = SampleText(choice, self._tokenizer, generation, prompt.sampling.min_tokens)
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
                            len(prompt.token_ids),
                            output.cached_tokens,
                            generated,
                            prompt.max_tokens,
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
                pieces.sort(key=_choice)
                yield pieces
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
