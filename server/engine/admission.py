"""How many sequences may have KV blocks at one time, from how long answers were and what over-confidence has cost.

Knows counts of tokens and blocks; which sequence is next, and which gives its blocks up, others decide.
"""

from bisect import bisect_right, insort
from collections import deque
from itertools import accumulate
from typing import NamedTuple

REMEMBERED = 128
"""How many of the last finished answers the estimate uses."""

MIN_CAUTION = 0.5
"""This share of the blocks that are expected to be needed at one time is enough while hardly anything is lost."""

MAX_CAUTION = 1.5
"""And never more than this share."""

ACCEPTED_LOSS = 0.02
"""When this share of all computed tokens was lost to preemptions, as many must be free as are expected to be needed."""

FIRST_BURST = 0.25
"""Where blocks are scarce, this share of the sequences that find room on average begin together, the others in turn."""


class Growing(NamedTuple):
    """A sequence with blocks.

    Attributes:
        expected: tokens that it is expected to get yet.
        blocks: that it has.
        more: blocks that those tokens need beyond them.
    """

    expected: int
    blocks: int
    more: int


class AnswerLengths:
    """The lengths of answers that have ended.

    Args:
        guess: tokens of an answer while nothing is known; it counts as some answers of this length, and fades.
    """

    def __init__(self, guess: int) -> None:
        self._latest = deque([guess] * (REMEMBERED // 8))
        self._sorted = list(self._latest)
        self._sums_from: list[int] | None = None

    def add(self, length: int) -> None:
        """Takes notice of an answer that has ended."""
        self._latest.append(length)
        insort(self._sorted, length)
        if len(self._latest) > REMEMBERED:
            self._sorted.pop(bisect_right(self._sorted, self._latest.popleft()) - 1)
        self._sums_from = None

    def remaining(self, so_far: int) -> int:
        """The expected number of further tokens of an answer that has `generated` ones, at least 1.

        The mean of what answers got that went on from there; where none did, half as many again.
        """
        lengths = self._sorted
        first = bisect_right(lengths, so_far)
        longer = len(lengths) - first
        if longer == 0:
            return so_far // 2 + 1
        if self._sums_from is None:
            self._sums_from = list(accumulate(reversed(lengths)))
        return max(1, -(-self._sums_from[longer - 1] // longer) - so_far)


class Admission:
    """Decides whether there is room for one more, and for how many of its samples.

    Args:
        num_blocks: of the pool.
        block_size: tokens in a block.
        typical_output: output tokens of a sequence while nothing is known.
    """

    def __init__(self, num_blocks: int, block_size: int, typical_output: int) -> None:
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._answers = AnswerLengths(typical_output)
        self._computed = 0
        self._lost = 0
        self._steps = 0
        self._last_step = 0

    def step(self, computed: int, short: bool = False) -> None:
        """Records a step and the number of tokens it computed.

        Args:
            computed: tokens.
            short: whether most sequences were not in it, so that it does not count in how fast they grow.
        """
        self._steps += not short
        self._computed += computed

    def lose(self, tokens: int) -> None:
        """Takes notice of computed tokens that a preemption threw away."""
        self._lost += tokens

    def end(self, output_length: int) -> None:
        """Takes notice of an answer that has ended."""
        self._answers.add(output_length)

    def growing(self, prompt_length: int, output_length: int, max_tokens: int, blocks: int) -> Growing:
        """What a sequence is and is expected to become.

        Args:
            prompt_length: tokens of its prompt.
            output_length: tokens it has generated.
            max_tokens: that it may generate in all.
            blocks: that it has.
        """
        expected = min(max_tokens - output_length, self._answers.remaining(output_length))
        return Growing(expected, blocks, max(0, self._blocks(prompt_length + output_length + expected) - blocks))

    def fits(self, running: list[Growing], one: Growing, count: int, free: int) -> int:
        """How many equal sequences may begin in addition to those that run.

        Args:
            running: those.
            one: of those that may begin.
            count: how many there are.
            free: blocks that are left when the first of them has its own.
        """
        if free < 0:
            return 0
        if not running:
            # No other sequence grows; on its own it always fits.
            return min(count, max(1, free))
        own_blocks = (count - 1) + count * one.more  # each but the first may copy the block that its prompt ends in
        if sum([own.more for own in running]) + own_blocks <= free:
            return count
        # All grow as fast.  If they began together, they would need most at one time and leave the blocks half empty on
        # average; if they begin in turn, each finds those of one that ends.
        average = self._num_blocks / (one.blocks + self._blocks(one.expected) / 2)
        if len(running) >= FIRST_BURST * average:
            if self._steps - self._last_step < one.expected / average:
                return 0
            count = 1
        while count > 0 and self._caution * self._most_growth([*running, *[one] * count]) > free:
            count //= 2
        if count > 0:
            self._last_step = self._steps
        return count

    @property
    def _caution(self) -> float:
        """The share of the expected growth that must be free: more, the more was lost."""
        lost = self._lost / (ACCEPTED_LOSS * self._computed) if self._computed else 0.0
        return min(MAX_CAUTION, MIN_CAUTION + (1 - MIN_CAUTION) * lost)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_size)

    def _most_growth(self, sequences: list[Growing]) -> int:
        """The most blocks that sequences are expected to have at one time beyond those that they have now."""
        most = freed = 0
        for place, own in enumerate(sorted(sequences)):
            most = max(most, (len(sequences) - place) * self._blocks(own.expected) - freed)
            freed += own.blocks
        return most
