"""The blocks of sequences: what each finds in the prefix cache, takes from the pool, copies, indexes and gives back.

Decides neither which sequence begins nor which one is preempted.
"""

from collections import Counter
from collections.abc import Sequence as Ordered
from typing import NamedTuple

from persimmon.server.engine.blocks import BlockPool
from persimmon.server.engine.promises import Promises
from persimmon.server.engine.sequence import Sequence


class BlockNeed(NamedTuple):
    """What a waiting sequence would take from the pool.

    Attributes:
        hits: blocks that it finds in the prefix cache.
        new: how many blocks it needs beyond them.
        left: how many would then be free; negative where there are too few.
    """

    hits: list[int]
    new: int
    left: int


class BlockTables:
    """Reserves and releases the blocks in sequences' tables, and keeps the prefix index up to date.

    Args:
        pool: the KV blocks.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._promises = Promises(pool.block_size)

    def need(self, sequence: Sequence) -> BlockNeed | None:
        """What a sequence without blocks needs; None while another one is computing the next block of its prefix."""
        hashes = self._reusable_hashes(sequence)
        hits = self._pool.lookup(hashes)
        if len(hits) < len(hashes) and hashes[len(hits)] in self._promises:
            return None
        new = self._pool.blocks_for(sequence.num_tokens) - len(hits)
        return BlockNeed(hits, new, self._pool.num_free - sum(map(self._pool.is_free, hits)) - new)

    def begin(self, sequence: Sequence, need: BlockNeed) -> None:
        """Gives a sequence the blocks that it needs, and announces those that it will compute."""
        self._pool.share(need.hits)
        sequence.block_table = [*need.hits, *self._pool.allocate(need.new)]
        sequence.num_computed = len(need.hits) * self._pool.block_size
        if self._pool.prefix_caching:
            self._promises.make(sequence, len(need.hits))

    def fork(self, sequence: Sequence, fork: Sequence) -> None:
        """Shares a sequence's blocks with a fork of it."""
        self._pool.share(sequence.block_table)
        fork.block_table = list(sequence.block_table)

    def hand_over(self, sequence: Sequence, successor: Sequence) -> None:
        """Gives what a sequence has, and what it promised to compute, to a fork that takes its place."""
        self._promises.withdraw(sequence, successor)
        sequence.hand_over(successor)

    def missing(self, running: Ordered[Sequence]) -> int:
        """How many blocks more than there are free ones the next tokens of all that decode need."""
        free = self._pool.num_free
        if free >= len(running):
            return 0
        size, needed = self._pool.block_size, 0
        writers: Counter[int] = Counter()
        for sequence in running:
            if sequence.num_uncomputed == 1 and not sequence.awaits_its_last_token:
                index = sequence.num_computed // size
                if index == len(sequence.block_table):
                    needed += 1
                else:
                    writers[sequence.block_table[index]] += 1
        # A sequence that writes into a block that others hold copies it, until only the last holder is left.
        needed += sum(min(count, self._pool.references(block) - 1) for block, count in writers.items())
        return needed - free

    def reserve_next(self, decoding: Ordered[Sequence], copies: list[tuple[int, int]]) -> None:
        """Makes room for one more token of each sequence.

        Args:
            decoding: the sequences; no blocks are `missing` for them.
            copies: gets the (from, to) blocks to copy before the step.
        """
        pool, size = self._pool, self._pool.block_size
        for sequence in decoding:
            table, index = sequence.block_table, sequence.num_computed // size
            if index == len(table):
                table += pool.allocate(1)
            elif pool.is_shared(table[index]):
                (block,) = pool.allocate(1)
                copies.append((table[index], block))
                pool.release([table[index]])
                table[index] = block

    def index_full(self, sequence: Sequence, start: int, end: int) -> None:
        """Makes the blocks findable that became full when a step computed the positions from `start` to `end`."""
        size = self._pool.block_size
        first, count = start // size, end // size
        if first < count and self._pool.prefix_caching:
            hashes = sequence.block_hashes(count, size)
            for number in range(first, count):
                self._pool.index(sequence.block_table[number], hashes[number])
                self._promises.keep(hashes[number])

    def retire(self, sequence: Sequence) -> None:
        """Takes back a sequence's blocks, unless a step under way may write them, and what it promised to compute."""
        self._promises.withdraw(sequence)
        if sequence.steps_under_way == 0:
            self.release(sequence)

    def release(self, sequence: Sequence) -> None:
        """Takes back a sequence's blocks."""
        self._pool.release(sequence.block_table)
        sequence.block_table = []

    def _reusable_hashes(self, sequence: Sequence) -> Ordered[bytes]:
        """The hashes of the blocks that it would take from the prefix cache, if they were there."""
        if not self._pool.prefix_caching:
            return []
        # The last token is always computed: its logits are what the next token is sampled from.  So are tokens whose
        # states are still to be reported: the cache does not hold those.
        reusable = sequence.num_tokens - 1
        if sequence.num_reported < sequence.prompt_length:
            reusable = sequence.num_reported
        return sequence.block_hashes(reusable // self._pool.block_size, self._pool.block_size)
