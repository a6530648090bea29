"""Runs a step: plain lists of tokens and blocks in, sampled tokens out.

Turns them into device tensors, runs the network and samples.  Knows nothing of requests or of why these sequences
run together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from persimmon.kernels import Rotary
from persimmon.kernels.launch import upload
from persimmon.model.config import VisionConfig
from persimmon.model.executor import Executor
from persimmon.model.logprobs import LogprobRows
from persimmon.model.patches import Patches, PatchSpan
from persimmon.model.persimmon import Step
from persimmon.model.row_sampling import RowSampling
from persimmon.model.sampler import Samples, rows_at_once
from persimmon.model.step_outcome import StepOutcome
from persimmon.model.token_logprobs import TokenLogprobs


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Wanted: how probable the prompt's own tokens are.

    Attributes:
        first: the first of the sequence's tokens in this step after which to look.
        next_tokens: the prompt's tokens after that one and after each that follows; may go one beyond the step's.
        top: number of most probable tokens to report with each.
    """

    first: int
    next_tokens: Sequence[int]
    top: int

    @property
    def rows(self) -> range:
        """The sequence's tokens in this step whose states are needed."""
        return range(self.first, self.first + len(self.next_tokens))


@dataclass(frozen=True, slots=True)
class PooledStates:
    """Wanted: the final states of tokens, or a classifier's scores of them.

    Attributes:
        rows: the sequence's tokens in this step whose states are wanted.
        total: whether their sum is wanted instead of each.
        scores: whether a classifier's scores are wanted instead of the states.
    """

    rows: range
    total: bool
    scores: bool = False


Report = PromptLogprobs | PooledStates


# Not frozen: of a sequence that decodes, it is changed in place from step to step.
@dataclass(slots=True)
class SequenceInput:
    """One sequence's part of a step; read before `Runner.launch` returns, and not kept.

    Attributes:
        token_ids: the tokens to compute, at least one.  A negative one, -1 - i, stands for the i-th token that the
            step before this one sampled.
        start: position of the first of them; all before it are in the cache.
        block_table: the blocks that hold the sequence, those for these tokens included.
        samplings: how next tokens are drawn, one for each sample that goes on from here; none when these tokens are
            not the last known ones.  With guesses, how the one sample draws at the last known token and at each guess.
        report: what else is wanted of these tokens.
        prompt_length: how many of the sequence's first tokens are its prompt, where that is more than the network's
            `rope_limit`; 0 where not.
        patches: the tokens among them that stand for image patches.
        guesses: how many of the last tokens are guesses at what follows the known ones.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    samplings: Sequence[RowSampling]
    report: Report | None = None
    prompt_length: int = 0
    patches: Sequence[PatchSpan] = ()
    guesses: int = 0

    @property
    def draws(self) -> Sequence[int]:
        """For each of its samples, at how many positions a token is drawn."""
        return [len(self.samplings)] if self.guesses else [1] * len(self.samplings)

    @property
    def tokens_apart(self) -> "Sequence[SequenceInput]":
        """With guesses, each token with its draw as if it came alone.

        Raises:
            ValueError: the guesses follow more than one token.
        """
        if len(self.token_ids) != 1 + self.guesses:
            raise ValueError(
                f"{self.guesses} guesses follow {len(self.token_ids) - self.guesses} tokens; expected one token, the "
                f"last known one: compute those before it in a step of their own"
            )
        return [
            SequenceInput(
                token_ids=[token_id], start=self.start + place, block_table=self.block_table, samplings=[sampling]
            )
            for place, (token_id, sampling) in enumerate(zip(self.token_ids, self.samplings, strict=True))
        ]


def apart(batch: Sequence[SequenceInput]) -> Sequence[SequenceInput]:
    """A batch in which each token of a sequence with guesses stands by itself; without guesses it is the same."""
    if not any(item.guesses for item in batch):
        return batch
    return [row for item in batch for row in (item.tokens_apart if item.guesses else [item])]


class PendingStep:
    """A step that has been started; the device may still be computing it.

    Args:
        copied: the event after which the memory below holds its numbers; None when nothing is to be waited for.
        samples: what was drawn; its tokens in the order of the result, its log-probabilities in that of the device.
        places: where each of those rows stands in the result.
        params: how each of those rows was drawn.
        draws: of how many rows of the result each sample has drawn, in order; None where each has drawn of one.
        prompt_logprobs: by the place of a sequence in the batch, with the number of most probable tokens asked for.
        pooled: by the place of a sequence in the batch, float32.

    All tensors are in host memory; on a GPU in pinned memory that a copy is on its way to.
    """

    def __init__(
        self,
        copied: torch.cuda.Event | None,
        samples: Samples,
        places: Sequence[int],
        params: Sequence[RowSampling],
        draws: Sequence[int] | None,
        prompt_logprobs: dict[int, tuple[LogprobRows, int]],
        pooled: dict[int, torch.Tensor],
    ) -> None:
        self._copied = copied
        self._samples = samples
        self._places = places
        self._params = params
        self._draws = draws
        self._prompt_logprobs = prompt_logprobs
        self._pooled = pooled

    def wait(self) -> StepOutcome:
        """The outcome, as soon as it is on the host.

        Uses no device: on the stream, anything would run after the step that has been launched since.
        """
        if self._copied is not None:
            self._copied.synchronize()
        tokens = [[token] for token in self._samples.tokens.tolist()]
        logprobs: dict[int, list[TokenLogprobs]] = {}
        if self._samples.logprobs is not None:
            reported = self._samples.reported
            entries = self._samples.logprobs.fetch([self._params[row].asked.logprobs or 0 for row in reported])
            for row, entry in zip(reported, entries, strict=True):
                logprobs[self._places[row]] = [entry]
        if self._draws is not None:
            tokens, logprobs = _by_sample(tokens, logprobs, self._draws)
        return StepOutcome(
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs={
                place: rows.fetch([top] * len(rows.token_ids)) for place, (rows, top) in self._prompt_logprobs.items()
            },
            pooled={place: states.numpy().astype("<f4").tobytes() for place, states in self._pooled.items()},
        )


class Runner:
    """Turns sequences into steps of a network, and what it makes of them into results.

    Args:
        executor: runs the steps, started.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._model = executor.model
        self._cache = executor.cache
        self._forward: Callable[[Step], torch.Tensor] = executor.forward
        self._sampler: Callable[[torch.Tensor, Sequence[RowSampling]], Samples] = executor.sample

    @property
    def vision(self) -> VisionConfig | None:
        """How the network reads images; None where it does not."""
        return self._model.config.vision

    @property
    def rope_limit(self) -> int | None:
        """Prompts longer than this have rotary frequencies that depend on their length; None where none have."""
        return self._model.config.rope_limit

    @property
    def max_guess_rows(self) -> int | None:
        """As `Executor.max_guess_rows`."""
        return self._executor.max_guess_rows

    @property
    def graph_replays(self) -> int:
        """How many steps were CUDA graphs."""
        return self._executor.replays

    def wrap_parts(self, wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Callable[[], None]:
        """Puts something around the parts of each step that is launched from here, like the ranges of a profile.

        Args:
            wrap: makes a function of a part's name ("network" or "sample") and the part.

        Returns:
            What undoes it.
        """
        before = self._forward, self._sampler
        self._forward, self._sampler = wrap("network", self._forward), wrap("sample", self._sampler)

        def unwrap() -> None:
            self._forward, self._sampler = before

        return unwrap

    @torch.inference_mode()
    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks of the cache before the next step: (from, to) pairs, no two to the same."""
        self._cache.copy(pairs)

    def run(self, batch: Sequence[SequenceInput]) -> list[int]:
        """Runs one step; a token for each of the batch's samplings."""
        return [token for (token,) in self.launch(batch).wait().tokens]

    @torch.inference_mode()
    def launch(self, batch: Sequence[SequenceInput]) -> PendingStep:
        """Starts one step without waiting for a GPU to end it; the next may be started at once.

        Returns:
            What comes of it, later.
        """
        draws = [count for item in batch for count in item.draws] if any(item.guesses for item in batch) else None
        drawn = self._executor.decode(batch)
        if drawn is not None:
            params = [own for item in batch for own in item.samplings]
            return self._pending(drawn, range(len(params)), params, draws, {}, {})
        # Single tokens first, then guesses, and by length, as `Executor.plan` wants them.
        order = sorted(range(len(batch)), key=lambda i: _place_in_step(batch[i]))
        inputs = [batch[i] for i in order]
        sampling_rows, report_rows = _wanted_rows(inputs)
        rows = sampling_rows + report_rows
        hidden = self._executor.states(inputs, rows)
        if hidden is None:
            hidden = self._forward(self._step(inputs, rows))
        states = hidden[len(sampling_rows) :]
        prompt_logprobs: dict[int, tuple[LogprobRows, int]] = {}
        pooled: dict[int, torch.Tensor] = {}
        for place, item in zip(order, inputs, strict=True):
            report = item.report
            if report is None:
                continue
            own, states = states[: len(report.rows)], states[len(report.rows) :]
            if isinstance(report, PromptLogprobs):
                prompt_logprobs[place] = (self._logprobs(own, report), report.top)
            else:
                pooled[place] = self._pooled(own, report)
        if not sampling_rows:
            nothing = Samples(torch.empty(0, dtype=torch.int64, device=hidden.device))
            return self._pending(nothing, (), (), None, prompt_logprobs, pooled)
        params = [own for item in inputs for own in item.samplings]
        samples = self._sampler(hidden[: len(sampling_rows)], params)
        places = _places(batch, order)
        if places != list(range(len(places))):
            tokens = samples.tokens
            samples = replace(samples, tokens=tokens[upload(np.argsort(places), tokens.device)])
        self._executor.keep(samples.tokens)
        return self._pending(samples, places, params, draws, prompt_logprobs, pooled)

    @torch.inference_mode()
    def logits(self, batch: Sequence[SequenceInput]) -> torch.Tensor:
        """Runs one step and returns the logits instead of sampling; the batch must be in the order `run` would use.

        Returns:
            [R, vocab_size] float32, a row for each of the batch's samplings.
        """
        step = self._step(batch, _wanted_rows(batch)[0])
        return self._model.logits(self._forward(step))

    def _pending(
        self,
        samples: Samples,
        places: Sequence[int],
        params: Sequence[RowSampling],
        draws: Sequence[int] | None,
        prompt_logprobs: dict[int, tuple[LogprobRows, int]],
        pooled: dict[int, torch.Tensor],
    ) -> PendingStep:
        """Everything that a step reports is copied to the host behind the step itself, before the next is launched."""
        reported = [] if samples.logprobs is None else [samples.logprobs]
        reported += [rows for rows, _ in prompt_logprobs.values()]
        made = [samples.tokens, *(tensor for rows in reported for tensor in rows.tensors), *pooled.values()]
        on_host, copied = self._executor.fetch(made)
        parts = iter(on_host)
        tokens = next(parts)
        rows_on_host = iter([LogprobRows(*(next(parts) for _ in rows.tensors)) for rows in reported])
        return PendingStep(
            copied=copied,
            samples=Samples(tokens, samples.reported, None if samples.logprobs is None else next(rows_on_host)),
            places=places,
            params=params,
            draws=draws,
            prompt_logprobs={place: (next(rows_on_host), top) for place, (_, top) in prompt_logprobs.items()},
            pooled=dict(zip(pooled, parts, strict=True)),
        )

    def _logprobs(self, states: torch.Tensor, report: PromptLogprobs) -> LogprobRows:
        """Log-probabilities of prompt tokens; a few rows at a time, because one of 262,144 logits is 1 MiB."""
        next_tokens = upload(np.array(report.next_tokens, dtype=np.int64), states.device)
        at_once = rows_at_once(self._model.config.vocab_size)
        return LogprobRows.concatenate(
            [
                LogprobRows.of(self._model.logits(some), tokens, report.top)
                for some, tokens in zip(torch.split(states, at_once), torch.split(next_tokens, at_once), strict=True)
            ]
        )

    def _pooled(self, states: torch.Tensor, report: PooledStates) -> torch.Tensor:
        rows = self._model.scores(states) if report.scores else states.float()
        return rows.sum(0, keepdim=True) if report.total else rows

    def _step(self, inputs: Sequence[SequenceInput], rows: Sequence[int]) -> Step:
        device = self._cache.device
        token_ids = [token for item in inputs for token in item.token_ids]
        every_row = len(rows) == len(token_ids) and all(row == place for place, row in enumerate(rows))
        return Step(
            token_ids=upload(np.array(token_ids, dtype=np.int64), device),
            attention=self._executor.plan(inputs),
            logits_rows=None if every_row else upload(np.array(rows, dtype=np.int64), device),
            # Without earlier samples a compiled embedding is another kernel, so it gets them in every step.
            sampled=self._executor.sampled if self._executor.compiles or min(token_ids) < 0 else None,
            rotary=self._rotary(inputs),
            patches=self._patches(inputs),
        )

    def _patches(self, inputs: Sequence[SequenceInput]) -> Patches | None:
        """The sequences' patches among the tokens of the step.

        Raises:
            ValueError: some do not fit.
        """
        width = 0 if self.vision is None else self.vision.patch_numbers
        places: list[np.ndarray] = []
        begin = 0
        for item in inputs:
            for span in item.patches:
                end = span.start + len(span.pixels)
                if span.start < 0 or end > len(item.token_ids) or span.pixels.shape[1:] != (width,):
                    raise ValueError(
                        f"a span of patches has {list(span.pixels.shape)} numbers for tokens from {span.start} on; "
                        f"expected [n, {width}] within the {len(item.token_ids)} tokens"
                    )
                places.append(np.arange(begin + span.start, begin + end))
            begin += len(item.token_ids)
        if not places:
            return None
        pixels = np.concatenate([span.pixels for item in inputs for span in item.patches])
        device = self._cache.device
        return Patches(places=upload(np.concatenate(places), device), pixels=upload(pixels, device))

    def _rotary(self, inputs: Sequence[SequenceInput]) -> Rotary | None:
        """The tokens' angles, where some are of a prompt that is too long for those of their positions.

        All of such a prompt has the frequencies of its length, as if it were computed in one pass; what comes after it
        has those of the length up to there, which the table has.
        """
        if all(item.start >= item.prompt_length - 1 for item in inputs):
            return None
        positions = [np.arange(item.start, item.start + len(item.token_ids)) for item in inputs]
        lengths = [np.maximum(own + 1, item.prompt_length) for own, item in zip(positions, inputs, strict=True)]
        return self._model.rotary_of_tokens(
            torch.from_numpy(np.concatenate(positions)), torch.from_numpy(np.concatenate(lengths))
        )


def _place_in_step(item: SequenceInput) -> tuple[bool, bool, int]:
    """Sorts single tokens first, then tokens with guesses, then chunks, each by length."""
    return len(item.token_ids) != 1, not item.guesses, item.start


def _wanted_rows(inputs: Sequence[SequenceInput]) -> tuple[list[int], list[int]]:
    """The rows of a step that are sampled from, the last as often as it has samples, and those of which is reported."""
    sampling: list[int] = []
    reported: list[int] = []
    begin = 0
    for item in inputs:
        end = begin + len(item.token_ids)
        if item.guesses:
            sampling += range(end - 1 - item.guesses, end)
        else:
            sampling += [end - 1] * len(item.samplings)
        if item.report is not None:
            reported += [begin + row for row in item.report.rows]
        begin = end
    return sampling, reported


def _places(batch: Sequence[SequenceInput], order: Sequence[int]) -> list[int]:
    """Where each sampled row stands in the order of the batch, when its sequences ran in another."""
    firsts = np.cumsum([0, *(len(item.samplings) for item in batch)]).tolist()
    return [place for i in order for place in range(firsts[i], firsts[i + 1])]


def _by_sample(
    tokens: Sequence[list[int]], logprobs: dict[int, list[TokenLogprobs]], draws: Sequence[int]
) -> tuple[list[list[int]], dict[int, list[TokenLogprobs]]]:
    """What rows have drawn and reported, put together for the samples, each of which has drawn of `draws` rows."""
    tokens_of: list[list[int]] = []
    logprobs_of: dict[int, list[TokenLogprobs]] = {}
    begin = 0
    for sample, count in enumerate(draws):
        rows = range(begin, begin + count)
        tokens_of.append([token for row in rows for token in tokens[row]])
        if begin in logprobs:
            logprobs_of[sample] = [entry for row in rows for entry in logprobs[row]]
        begin += count
    return tokens_of, logprobs_of
