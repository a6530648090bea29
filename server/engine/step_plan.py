"""What the scheduler decides of a step, and what came of it: data only."""

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.step_cost import NO_WORK, StepWork


# A step makes one for each sequence, so they are made cheaply: neither frozen, which is four times as slow, nor by
# keyword, which is twice as slow; what not every part has is set afterwards.
@dataclass(slots=True)
class ScheduledSequence:
    """The part of a step that belongs to one sequence.

    Attributes:
        sequence: whose tokens.
        start: position of the first token to compute.
        count: how many tokens from there.
        samples: the sequences that get their next token from the last of them: none for a chunk that ends inside the
            prompt, several where forks begin.
        report_from: the first position whose state is to be reported; None where there is none.
        pending_row: of a token to compute that the step before is still sampling, its place among all that are.
        guesses: the last tokens to compute, where they are guesses at what the sequence gets next.  A token is drawn
            at each of them and at the one before; it counts as long as the guesses before it were right.
    """

    sequence: Sequence
    start: int
    count: int
    samples: tuple[Sequence, ...] = ()
    report_from: int | None = None
    pending_row: int | None = None
    guesses: Ids[int] = ()

    @property
    def members(self) -> tuple[Sequence, ...]:
        """The sequences that this part brings on."""
        return self.samples or (self.sequence,)

    @property
    def draws(self) -> int:
        """The last positions that a token is drawn at, for each of the samples."""
        return 1 + len(self.guesses)

    @property
    def end(self) -> int:
        """The position after the last token to compute."""
        return self.start + self.count


@dataclass(slots=True)
class StepPlan:
    """One step: sequences that decode come first, then prompt chunks.

    Attributes:
        scheduled: what is computed.
        copies: (from, to) blocks to copy before that, because a sequence writes into what others read.
        num_samples: sequences that the step draws tokens for.
        num_guesses: guessed tokens that it computes.
        work: how much it computes.
        short: whether it runs only for clients with little work; see `persimmon.server.engine.short_steps`.
    """

    scheduled: list[ScheduledSequence] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    num_samples: int = 0
    num_guesses: int = 0
    work: StepWork = NO_WORK
    short: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens the step computes."""
        return sum(item.count for item in self.scheduled)


@dataclass(slots=True)
class Advance:
    """A sequence that a step has advanced.

    Attributes:
        sequence: the sequence that advanced.
        tokens: its new tokens, in order; none for one that ended with its prompt.
        row: its place among the step's samples.
    """

    sequence: Sequence
    tokens: list[int]
    row: int
