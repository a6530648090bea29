"""What the scheduler decides of a step, and what came of it: data only."""

from dataclasses import dataclass, field

from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.step_cost import NO_WORK, StepWork


# Not frozen, because that makes each four times as slow to make.
@dataclass(slots=True)
class ScheduledSequence:
    """The part of a step that belongs to one sequence.

    Attributes:
        sequence: whose tokens.
        start: position of the first token to compute.
        count: how many tokens from there.
        samples: the sequences that get their next token from the last of them: none for a chunk that ends inside the
            prompt, several where forks begin.
        report_from: the first position whose state is to be reported; end where there is none.
        pending_row: of a token to compute that the step before is still sampling, its place among all that are.
    """

    sequence: Sequence
    start: int
    count: int
    samples: tuple[Sequence, ...]
    report_from: int
    pending_row: int | None = None

    @property
    def members(self) -> tuple[Sequence, ...]:
        """The sequences that this part brings on."""
        return self.samples or (self.sequence,)

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
        num_samples: tokens that the step samples.
        work: how much it computes.
    """

    scheduled: list[ScheduledSequence] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    num_samples: int = 0
    work: StepWork = NO_WORK

    @property
    def num_tokens(self) -> int:
        """Tokens the step computes."""
        return sum(item.count for item in self.scheduled)


@dataclass(slots=True)
class Advance:
    """A sequence that a step has brought on.

    Attributes:
        sequence: it.
        token: its new token; None for one that ended with its prompt.
        row: the token's place among all that the step sampled.
    """

    sequence: Sequence
    token: int | None
    row: int
