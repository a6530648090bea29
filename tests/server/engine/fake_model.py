"""A model without numbers: it keeps, in place of keys and values, the tokens they would have been computed from.

So a block that is stale, wrongly shared or overwritten is seen by the first step that reads it.  The model computes as
late as it may: a step's reads and writes happen when the step is waited for, after the next was planned where steps
overlap.
"""

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from zlib import crc32

from persimmon.server.engine.proposers import NO_PROPOSAL, Proposal
from persimmon.server.engine.step_plan import ScheduledSequence, StepPlan

VOCABULARY = 3
"""So few tokens that prompts and answers often share prefixes."""

STEMS = [[0, 1, 2, 0, 2, 1] * 5, [2, 2, 1, 0, 0, 1] * 5]
"""What prompts begin with, so that they meet in the prefix cache."""


def next_token(token_ids: Ids[int], sample_index: int = 0) -> int:
    """What the fake model says after these tokens; samples of one prompt differ."""
    return crc32(bytes([*token_ids, *[255] * sample_index])) % VOCABULARY


def generate_alone(
    prompt: Ids[int], max_tokens: int, stop_token_ids: Iterable[int] = (), sample_index: int = 0
) -> tuple[list[int], str]:
    """The answer and finish reason of a sequence that has the machine to itself."""
    token_ids, stops = list(prompt), set(stop_token_ids)
    for _ in range(max_tokens):
        token_ids.append(next_token(token_ids, sample_index))
        if token_ids[-1] in stops:
            return token_ids[len(prompt) :], "stop"
    return token_ids[len(prompt) :], "length"


@dataclass(frozen=True)
class OneProposal:
    """Guesses once: what comes after a sequence of this many tokens."""

    num_tokens: int
    guesses: list[int]

    def propose(self, token_ids: Ids[int], count: int) -> Proposal:
        assert count > 0
        return Proposal(self.guesses[:count], 1) if len(token_ids) == self.num_tokens else NO_PROPOSAL


@dataclass(frozen=True)
class Oracle:
    """Makes guesses in every step; those at regular intervals are wrong."""

    sample_index: int
    max_guesses: int
    right_in_a_row: int

    def propose(self, token_ids: Ids[int], count: int) -> Proposal:
        known = list(token_ids)
        for _ in range(min(count, self.max_guesses)):
            right = next_token(known, self.sample_index)
            known.append(right if len(known) % (self.right_in_a_row + 1) else (right + 1) % VOCABULARY)
        return Proposal(known[len(token_ids) :], 1)


@dataclass(frozen=True)
class LaunchedPart:
    """A part of a step as a device gets it: what it knows of the sequence does not change any more."""

    item: ScheduledSequence
    token_ids: list[int]
    pending_row: int | None
    block_table: list[int]

    @classmethod
    def of(cls, item: ScheduledSequence) -> "LaunchedPart":
        sequence = item.sequence
        known = [*sequence.token_ids[: item.end], *item.guesses]
        assert len(known) == item.end - (item.pending_row is not None)
        return cls(item=item, token_ids=known, pending_row=item.pending_row, block_table=list(sequence.block_table))

    def tokens(self, sampled_before: list[int]) -> list[int]:
        """The sequence up to the end of the part."""
        if self.pending_row is None:
            return self.token_ids
        return [*self.token_ids, *sampled_before[self.pending_row : self.pending_row + 1]]


class FakeModel:
    """Runs plans over a cache whose slots remember which tokens their content depends on."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._slots: list[tuple[int, ...] | None] = [None] * (num_blocks * block_size)
        self._launched: deque[tuple[list[tuple[int, int]], list[LaunchedPart]]] = deque()
        self._sampled: list[int] = []

    def launch(self, plan: StepPlan) -> None:
        """Takes a step, which will be computed when it is waited for."""
        self._launched.append((list(plan.copies), [LaunchedPart.of(item) for item in plan.scheduled]))

    def blocks_to_write(self) -> set[int]:
        """The blocks that launched steps have not written yet."""
        size = self._block_size
        blocks = {target for copies, _ in self._launched for _, target in copies}
        for _, parts in self._launched:
            for part in parts:
                blocks |= set(part.block_table[part.item.start // size : -(-part.item.end // size)])
        return blocks

    def wait(self) -> list[list[int]]:
        """Computes the oldest launched step and samples, reading the cache before and after all writes of the step."""
        copies, parts = self._launched.popleft()
        self._copy(copies)
        for part in parts:
            self._read(part, part.item.start)
        for part in parts:
            token_ids = part.tokens(self._sampled)
            for position in range(part.item.start, part.item.end):
                self._slots[self._slot(part, position)] = tuple(token_ids[: position + 1])
        for part in parts:
            self._read(part, part.item.end)
        drawn = [
            [
                next_token(part.tokens(self._sampled)[: part.item.end - later], sample.sample_index)
                for later in range(part.item.draws - 1, -1, -1)
            ]
            for part in parts
            for sample in part.item.samples
        ]
        self._sampled = [tokens[-1] for tokens in drawn]
        return drawn

    def fail(self) -> None:
        """The oldest launched step computes nothing."""
        self._launched.popleft()
        self._sampled = []

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        size = self._block_size
        targets = [target for _, target in copies]
        assert len(set(targets)) == len(targets), "two blocks are copied into one"
        before = list(self._slots)
        for source, target in copies:
            self._slots[target * size : (target + 1) * size] = before[source * size : (source + 1) * size]

    def _read(self, part: LaunchedPart, end: int) -> None:
        if all(own.finished for own in part.item.members):
            return  # its results are not used
        token_ids = part.tokens(self._sampled)
        for position in range(end):
            held = self._slots[self._slot(part, position)]
            wanted = tuple(token_ids[: position + 1])
            assert held == wanted, f"position {position} of {part.item.sequence.key} attends to {held}, not {wanted}"

    def _slot(self, part: LaunchedPart, position: int) -> int:
        return part.block_table[position // self._block_size] * self._block_size + position % self._block_size
