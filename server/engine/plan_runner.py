"""The scheduler's plans in the model's words: what each sequence computes, how it draws, what it reports.

Knows both sides and translates; decides nothing.  Keeps with each sequence what its draws carry on from token to token:
the tokens that penalties look at, where its grammar stands, and its row of a decode step.
"""

from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Ids
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from persimmon.model.grammar_spec import GrammarError, GrammarSpec
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import PendingStep, PooledStates, PromptLogprobs, Report, Runner, SequenceInput
from persimmon.model.step_outcome import StepOutcome
from persimmon.model.token_counts import SeenTokens, TokenCounts
from persimmon.server.engine.image_spans import ImageSpans, patches_within
from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.step_plan import ScheduledSequence, StepPlan
from persimmon.server.engine.step_runner import LaunchedStep

if TYPE_CHECKING:
    # Brings llguidance, which an engine that is given no compiler does without.
    from persimmon.model.grammar import ForcedText, GrammarCompiler, Matcher

COMPILED_GRAMMARS = 16
"""Compiled grammars that are kept, the most recently used ones.  The caches of one can grow to 25 MB."""


class PlanRunner:
    """Runs the scheduler's plans on the model.

    Args:
        runner: the model's.
        compiler: compiles grammars; None where no sequence has one.
        guess_forced: whether what a grammar forces may be guessed.
    """

    def __init__(
        self, runner: Runner, compiler: "GrammarCompiler | None" = None, *, guess_forced: bool = False
    ) -> None:
        self._runner = runner
        self._compiler = compiler
        self._guess_forced = guess_forced
        # A thread for each, because masks are wanted in every step and a compilation may take long.
        self._compiling = ThreadPoolExecutor(1, thread_name_prefix="grammar-compiler")
        self._masking = ThreadPoolExecutor(1, thread_name_prefix="grammar-masks")
        self._compiled: OrderedDict[GrammarSpec, Future[_Compiled]] = OrderedDict()
        self._images = ImageSpans()

    def prepare(self, sequence: Sequence) -> "Future[_Compiled] | None":
        """Starts what a sequence and its forks need before they run; None when that is nothing.

        Returns:
            Done when they may run; fails with a GrammarError when they cannot.

        Raises:
            NoRoomError: there is no room for its images.
            ValueError: the prompt has image patches that this model does not read, or not as they are.
        """
        if sequence.spans:
            self._images.admit(sequence, self._runner.vision)
        grammar = sequence.sampling.grammar
        if grammar is None:
            return None
        compiled = self._compiled.get(grammar)
        if compiled is None or (compiled.done() and compiled.exception() is not None):
            compiled = self._compiled[grammar] = self._compiling.submit(self._compile, grammar)
        self._compiled.move_to_end(grammar)
        while len(self._compiled) > COMPILED_GRAMMARS:
            self._compiled.popitem(last=False)
        for own in sequence.family:
            _state(own).compiled = compiled
            if self._guess_forced and own.speculate:
                own.forced = _Forced(compiled, own.prompt_length)
        return compiled

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Starts one step."""
        if plan.copies:
            self._runner.copy_blocks(plan.copies)
        return _Launched(self, plan, self._runner.launch([self._input(item) for item in plan.scheduled]))

    def _compile(self, grammar: GrammarSpec) -> "_Compiled":
        if self._compiler is None:
            raise GrammarError("this model does not support grammars")
        matcher = self._compiler.compile(grammar)
        return _Compiled(matcher, self._compiler.compile_forced(grammar) if self._guess_forced else None)

    def _input(self, item: ScheduledSequence) -> SequenceInput:
        sequence, state = item.sequence, _state(item.sequence)
        patches = patches_within(sequence, item.start, item.end) if sequence.spans else []
        if (
            not patches
            and item.count == 1
            and item.samples == (sequence,)
            and state.is_plain
            and item.report_from is None
        ):
            return state.decode(item)
        token_ids = sequence.token_ids[item.start : item.end]
        if item.guesses:
            token_ids += item.guesses
            samplings = self._samplings_at_guesses(sequence, item.guesses)
        else:
            samplings = [self._sampling(sample, item.end - sample.prompt_length) for sample in item.samples]
        return SequenceInput(
            token_ids=token_ids if item.pending_row is None else [-1 - item.pending_row],
            start=item.start,
            block_table=sequence.block_table,
            samplings=samplings,
            report=_report(item),
            prompt_length=self._long_prompt(sequence),
            patches=patches,
            guesses=len(item.guesses),
        )

    def _long_prompt(self, sequence: Sequence) -> int:
        """The length of a prompt if its rotary frequencies depend on it, because it exceeds a limit; else 0."""
        limit = self._runner.rope_limit
        return sequence.prompt_length if limit is not None and sequence.prompt_length > limit else 0

    def _sampling(self, sequence: Sequence, position: int) -> RowSampling:
        """How the token at a position of a sequence's output is drawn."""
        if sequence.sampling.is_plain:
            return _plain_sampling(sequence, position)
        seen = self._seen(sequence) if sequence.sampling.penalizes else None
        allowed = self._allowed(sequence) if sequence.sampling.grammar is not None else None
        return _sampling_at(sequence, position, seen, allowed)

    def _samplings_at_guesses(self, sequence: Sequence, guesses: Ids[int]) -> list[RowSampling]:
        """How tokens are drawn after the last known token and after each guess, as if those before had been drawn."""
        first, count = sequence.num_output_tokens, 1 + len(guesses)
        if sequence.sampling.is_plain:
            return [_plain_sampling(sequence, position) for position in range(first, first + count)]
        seen: list[SeenTokens | None] = [None] * count
        if sequence.sampling.penalizes:
            counts = self._seen(sequence)
            seen = [counts, *(counts.followed_by(guesses[:known]) for known in range(1, count))]
        allowed: list[Callable[[], np.ndarray] | None] = [None] * count
        if sequence.sampling.grammar is not None:
            progress, new_ids = self._progress(sequence)
            masks = self._masking.submit(partial(progress.advance_with_guesses, new_ids, guesses))
            allowed = [partial(_item, masks, place) for place in range(count)]
        return [_sampling_at(sequence, first + place, seen[place], allowed[place]) for place in range(count)]

    def _seen(self, sequence: Sequence) -> TokenCounts:
        state = _state(sequence)
        if state.counts is None:
            state.counts = TokenCounts(sequence.token_ids[: sequence.prompt_length])
        for token_id in sequence.token_ids[sequence.prompt_length + state.counts.output_length :]:
            state.counts.append(token_id)
        return state.counts

    def _allowed(self, sequence: Sequence) -> Callable[[], np.ndarray]:
        progress, new_ids = self._progress(sequence)
        return self._masking.submit(partial(progress.advance, new_ids)).result

    def _progress(self, sequence: Sequence) -> "tuple[GrammarProgress, list[int]]":
        """Where a sequence stands in its grammar, and the tokens that it has got since."""
        state = _state(sequence)
        if state.progress is None:
            if state.compiled is None:
                raise ValueError("the grammar of a sequence was not prepared")
            state.progress = GrammarProgress(state.compiled.result().matcher.copy())
        return state.progress, sequence.token_ids[sequence.prompt_length + state.progress.num_tokens :]

    def failures(self, plan: StepPlan) -> dict[int, str]:
        """By the place of a sample among all of a step: why its sequence cannot go on."""
        failures = {}
        samples = (sample for item in plan.scheduled for sample in item.samples)
        for row, sample in enumerate(samples):
            progress = _state(sample).progress
            if progress is not None and progress.error is not None:
                failures[row] = progress.error
                # Its copies share what was found out about it, up to a limit that this one has perhaps reached.
                if sample.sampling.grammar is not None:
                    self._compiled.pop(sample.sampling.grammar, None)
        return failures

    def drawn(self, plan: StepPlan, tokens: Ids[list[int]]) -> Ids[list[int]]:
        """What a step has drawn, without what was drawn after guesses that a grammar does not allow or follow."""
        if plan.num_guesses == 0:
            return tokens
        kept = list(tokens)
        samples = [(item, sample) for item in plan.scheduled for sample in item.samples]
        for row, (item, sample) in enumerate(samples):
            progress = _state(sample).progress
            if item.guesses and progress is not None:
                kept[row] = kept[row][: 1 + progress.num_guesses]
        return kept


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A grammar, at the beginning of an answer; copied for each.

    Attributes:
        matcher: decides which tokens may come.
        forced: finds what is forced; None where that is not guessed.
    """

    matcher: "Matcher"
    forced: "ForcedText | None"


class _Forced:
    """Finds what the grammar of one sequence forces, once that is compiled.

    Args:
        compiled: the grammar, with what finds that.
        prompt_length: of the sequence.
    """

    def __init__(self, compiled: Future[_Compiled], prompt_length: int) -> None:
        self._compiled = compiled
        self._known = prompt_length
        self._own: ForcedText | None = None

    def guess(self, token_ids: Ids[int], count: int, others: Ids[int]) -> tuple[Ids[int], int]:
        """As `ForcedTokens.guess`."""
        if self._own is None:
            shared = self._compiled.result().forced
            if shared is None:
                return (), 0
            self._own = shared.copy()
        new_ids, self._known = token_ids[self._known :], len(token_ids)
        return self._own.guess(new_ids, count, others)


class GrammarProgress:
    """Where one sequence stands in its grammar.

    Args:
        matcher: at the beginning; its own.

    Attributes:
        num_tokens: output tokens that it has seen.
        num_guesses: how many guesses after those it could follow when it last got some.
        error: why it cannot go on, if so.
    """

    def __init__(self, matcher: "Matcher") -> None:
        self._matcher = matcher
        self._mask = matcher.mask()
        self.num_tokens = 0
        self.num_guesses = 0
        self.error: str | None = None

    def advance(self, token_ids: list[int]) -> np.ndarray:
        """Takes the output's next tokens; which may follow, as `RowSampling.allowed` has it.

        After an error it is as if the last tokens had not come: the sequence ends, and the step that it is in should
        not.
        """
        try:
            for token_id in token_ids:
                self._matcher.consume(token_id)
            self.num_tokens += len(token_ids)
            self._mask = self._matcher.mask()
        except GrammarError as error:
            self.error = str(error)
        return self._mask

    def advance_with_guesses(self, token_ids: list[int], guesses: Ids[int]) -> list[np.ndarray]:
        """Takes the output's next tokens; which may follow them, and which each of the guesses after them.

        Guesses are not remembered.  From the first on that cannot be followed, because the grammar does not allow it or
        becomes too complex, it gives the mask of the place before: what is drawn there does not count.
        """
        masks = [self.advance(token_ids)]
        if self.error is None:
            ahead = self._matcher.copy()
            with suppress(GrammarError):  # a right guess brings it again in the next step, which ends the sequence
                for guess in guesses:
                    ahead.consume(guess)
                    masks.append(ahead.mask())
        self.num_guesses = len(masks) - 1
        return masks + masks[-1:] * (1 + len(guesses) - len(masks))


class _SequenceState:
    """What is kept with a sequence while it lives.

    Args:
        sequence: it.

    Attributes:
        is_plain: whether each of its draws differs from the one before only in its position.
        compiled: its grammar, when that is compiled; shared.
        counts: the tokens that penalties look at.
        progress: where it stands in its grammar.
    """

    __slots__ = ("_input", "_params", "_token_ids", "compiled", "counts", "is_plain", "progress")

    def __init__(self, sequence: Sequence) -> None:
        self.is_plain = sequence.sampling.is_plain
        self.compiled: Future[_Compiled] | None = None
        self.counts: TokenCounts | None = None
        self.progress: GrammarProgress | None = None
        self._params = _plain_sampling(sequence, 0)
        self._token_ids = [0]
        self._input = SequenceInput(
            token_ids=self._token_ids, start=0, block_table=sequence.block_table, samplings=[self._params]
        )

    def decode(self, item: ScheduledSequence) -> SequenceInput:
        """Its row of a decode step: the same objects in every step, so that few are made.  `launch` reads them."""
        sequence, start = item.sequence, item.start
        self._token_ids[0] = sequence.token_ids[start] if item.pending_row is None else -1 - item.pending_row
        self._params.position = start + 1 - sequence.prompt_length
        row = self._input
        row.start = start
        row.block_table = sequence.block_table
        return row


def _state(sequence: Sequence) -> _SequenceState:
    state = sequence.runner_state
    if not isinstance(state, _SequenceState):
        state = sequence.runner_state = _SequenceState(sequence)
    return state


class _Launched:
    """A step that has been started."""

    def __init__(self, owner: PlanRunner, plan: StepPlan, pending: PendingStep) -> None:
        self._owner = owner
        self._plan = plan
        self._pending = pending

    def wait(self) -> StepOutcome:
        outcome = self._pending.wait()
        outcome.failures = self._owner.failures(self._plan)
        outcome.tokens = self._owner.drawn(self._plan, outcome.tokens)
        return outcome


def _plain_sampling(sequence: Sequence, position: int) -> RowSampling:
    return RowSampling(asked=sequence.sampling, sample_index=sequence.sample_index, position=position)


def _sampling_at(
    sequence: Sequence, position: int, seen: SeenTokens | None, allowed: Callable[[], np.ndarray] | None
) -> RowSampling:
    return RowSampling(
        asked=sequence.sampling,
        sample_index=sequence.sample_index,
        position=position,
        seen=seen,
        banned=tuple(sequence.stop_token_ids) if position < sequence.sampling.min_tokens else (),
        allowed=allowed,
    )


def _item(masks: "Future[list[np.ndarray]]", place: int) -> np.ndarray:
    return masks.result()[place]


def _report(item: ScheduledSequence) -> Report | None:
    if item.report_from is None:
        return None
    sequence = item.sequence
    first, end = item.report_from - item.start, min(item.end, sequence.prompt_length) - item.start
    if sequence.pooling is not None:
        return PooledStates(range(first, end), total=sequence.pooling == "sum", scores=sequence.scores)
    if sequence.prompt_logprobs is None:
        return None
    # The prompt's last token has none after it, the others may have theirs in the next chunk.
    next_tokens = sequence.token_ids[item.report_from + 1 : min(item.end + 1, sequence.prompt_length)]
    return PromptLogprobs(first, next_tokens, sequence.prompt_logprobs) if next_tokens else None
