"""The block pool against a naive account of it: who holds what, what is in it, and what goes first."""

from collections import Counter
from collections.abc import Sequence as Ids
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from persimmon.server.engine.blocks import ROOT_HASH, BlockPool, hash_block

Prefix = tuple[int, ...]


def hash_chain(tokens: Ids[int], block_size: int) -> list[bytes]:
    """Hashes of the full blocks of these tokens."""
    hashes = [ROOT_HASH]
    for start in range(0, len(tokens) - block_size + 1, block_size):
        hashes.append(hash_block(hashes[-1], tokens[start : start + block_size]))
    return hashes[1:]


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    """One to twelve tokens; the beginnings are often the same."""
    stem = draw(st.sampled_from([[0, 1] * 5, [1] * 10, []]))
    length = draw(st.integers(0, len(stem)))
    return stem[:length] + draw(st.lists(st.integers(0, 1), min_size=1, max_size=2))


class Table:
    """What a sequence holds: blocks, the tokens meant for them, and how many blocks of these are computed."""

    def __init__(self, blocks: list[int], tokens: list[int], computed: int) -> None:
        self.blocks = blocks
        self.tokens = tokens
        self.computed = computed


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, share what is known, compute the rest, and go; the model is lists and a dictionary."""

    @initialize(
        num_blocks=st.sampled_from([12, 8, 5, 2]),
        block_size=st.sampled_from([2, 1, 3]),
        prefix_caching=st.sampled_from([True, True, True, False]),
        arrivals=st.lists(prompts(), min_size=1, max_size=5),
    )
    def create(self, num_blocks: int, block_size: int, prefix_caching: bool, arrivals: list[list[int]]) -> None:
        self.pool = BlockPool(num_blocks, block_size, prefix_caching=prefix_caching)
        self.free = list(range(num_blocks))
        """Blocks that no sequence holds, the one freed longest ago first."""
        self.found_as: dict[Prefix, int] = {}
        """Which block each prefix that is full and computed is found in, as lookup should see it."""
        self.content: dict[int, Prefix] = {}
        """What was last computed in each block: all tokens up to its end."""
        self.tables: list[Table] = []
        # Hypothesis leaves rules out of many runs to explore the others; without tables there is nothing to see.
        for prompt in arrivals:
            self.come_and_go(prompt)
            self.admit(prompt, computes=True)

    @rule(prompt=prompts())
    def come_and_go(self, prompt: list[int]) -> None:
        if self.admit(prompt, computes=True):
            self.release(self.tables[-1])

    @rule(prompt=prompts(), computes=st.booleans())
    def arrive(self, prompt: list[int], computes: bool) -> None:
        self.admit(prompt, computes)

    def admit(self, prompt: list[int], computes: bool) -> bool:
        hits = self.hits(prompt)
        fresh = self.pool.blocks_for(len(prompt)) - len(hits)
        if fresh > len([block for block in self.free if block not in hits]):
            event("a prompt does not fit")
            return False
        event(f"hits: {min(len(hits), 3)}")
        self.pool.share(hits)
        self.free = [block for block in self.free if block not in hits]
        self.tables.append(Table(hits + self.allocate(fresh), prompt, len(hits)))
        if computes:
            self.compute_all(self.tables[-1])
        return True

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        self.compute_all(data.draw(st.sampled_from(self.tables)))

    def compute_all(self, table: Table) -> None:
        size = self.pool.block_size
        while (table.computed + 1) * size <= len(table.tokens):
            prefix = tuple(table.tokens[: (table.computed + 1) * size])
            block = table.blocks[table.computed]
            self.content[block] = prefix
            self.pool.index(block, hash_chain(prefix, size)[-1])
            if prefix in self.found_as:
                event("a prefix was computed twice")
            elif self.pool.prefix_caching:
                self.found_as[prefix] = block
            table.computed += 1

    @rule(prompt=prompts())
    def look_up(self, prompt: list[int]) -> None:
        self.hits(prompt)

    def hits(self, tokens: list[int]) -> list[int]:
        size = self.pool.block_size
        prefixes = [tuple(tokens[:end]) for end in range(size, len(tokens) + 1, size)]
        known = [prefix in self.found_as for prefix in prefixes]
        expected = prefixes[: known.index(False) if False in known else len(prefixes)]
        found = self.pool.lookup(hash_chain(tokens, size))
        assert [self.content[block] for block in found] == expected
        assert found == [self.found_as[prefix] for prefix in expected]
        return found

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def hold_again(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        blocks = table.blocks[: table.computed]
        self.pool.share(blocks)
        self.tables.append(Table(blocks, table.tokens[: table.computed * self.pool.block_size], table.computed))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.release(data.draw(st.sampled_from(self.tables)))

    def release(self, table: Table) -> None:
        self.tables.remove(table)
        self.pool.release(table.blocks)
        held = self.held()
        self.free += [block for block in reversed(table.blocks) if held[block] == 0]

    @rule(more=st.integers(1, 3))
    def asking_for_too_many_takes_nothing(self, more: int) -> None:
        with pytest.raises(ValueError, match=f"{len(self.free) + more} blocks .* {len(self.free)} are free"):
            self.pool.allocate(len(self.free) + more)

    @precondition(lambda self: self.free)
    @rule(data=st.data())
    def releasing_a_free_block_is_refused(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.free))
        with pytest.raises(ValueError, match=f"block {block} was released more often than it was taken"):
            self.pool.release([block])

    @invariant()
    def every_block_is_free_or_held(self) -> None:
        held = self.held()
        assert self.pool.num_free == len(self.free)
        assert len(held) + len(self.free) == self.pool.num_blocks
        for block in range(self.pool.num_blocks):
            assert self.pool._references[block] == held[block]
            assert self.pool.is_free(block) == (block in self.free)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for table in self.tables:
                self.pool.release(table.blocks)
            assert self.pool.num_free == self.pool.num_blocks

    def allocate(self, count: int) -> list[int]:
        blocks = self.pool.allocate(count)
        assert blocks == self.free[:count], "the blocks freed longest ago go first, and only free ones"
        del self.free[:count]
        forgotten = [prefix for prefix, block in self.found_as.items() if block in blocks]
        for prefix in forgotten:
            event("a cached prefix was evicted")
            del self.found_as[prefix]
        return blocks

    def held(self) -> Counter[int]:
        return Counter(block for table in self.tables for block in table.blocks)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(
    deadline=None, max_examples=200, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow]
)


def computed(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Blocks that hold these tokens, computed and indexed, with one reference each."""
    blocks = pool.allocate(pool.blocks_for(len(tokens)))
    for block, block_hash in zip(blocks, hash_chain(tokens, pool.block_size), strict=False):
        pool.index(block, block_hash)
    return blocks


def test_a_freed_prefix_is_found_until_its_blocks_are_needed() -> None:
    pool = BlockPool(4, 2)
    blocks = computed(pool, [1, 2, 3, 4])
    pool.release(blocks)
    assert pool.lookup(hash_chain([1, 2, 3, 4], 2)) == blocks
    pool.allocate(2)
    assert pool.lookup(hash_chain([1, 2, 3, 4], 2)) == blocks
    pool.allocate(2)
    assert pool.lookup(hash_chain([1, 2, 3, 4], 2)) == []


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(3, 1)
    blocks = computed(pool, [7, 8, 9])
    pool.release(blocks)
    for kept in (2, 1, 0):
        pool.allocate(1)
        assert pool.lookup(hash_chain([7, 8, 9], 1)) == blocks[:kept]


def test_a_prefix_used_again_outlives_one_that_was_not() -> None:
    pool = BlockPool(2, 1)
    older, newer = computed(pool, [1]), computed(pool, [2])
    pool.release(older)
    pool.release(newer)
    pool.share(older)
    pool.release(older)
    assert pool.allocate(1) == newer


def test_a_shared_block_is_free_only_after_its_last_release() -> None:
    pool = BlockPool(1, 1)
    blocks = pool.allocate(1)
    pool.share(blocks)
    pool.release(blocks)
    assert pool.num_free == 0
    pool.release(blocks)
    assert pool.num_free == 1


def test_lookup_takes_no_reference() -> None:
    pool = BlockPool(2, 1)
    pool.release(computed(pool, [1, 2]))
    assert len(pool.lookup(hash_chain([1, 2], 1))) == 2
    assert pool.num_free == 2


def test_equal_blocks_after_different_prefixes_are_different() -> None:
    pool = BlockPool(4, 2)
    computed(pool, [1, 1, 5, 5])
    assert pool.lookup(hash_chain([2, 2, 5, 5], 2)) == []
    assert pool.lookup(hash_chain([5, 5], 2)) == []


def test_lookup_ends_at_the_first_block_that_is_gone() -> None:
    pool = BlockPool(3, 1)
    blocks = computed(pool, [1, 2, 3])
    pool.share(blocks[2:])
    pool.release(blocks)
    pool.allocate(1)
    assert pool.lookup(hash_chain([1, 2, 3], 1)) == blocks[:1]
    pool.allocate(1)
    assert pool.lookup(hash_chain([1, 2, 3], 1)) == []


def test_the_first_of_two_equal_blocks_stays_the_one_that_is_found() -> None:
    pool = BlockPool(2, 2)
    first, second = computed(pool, [1, 2]), computed(pool, [1, 2])
    assert pool.lookup(hash_chain([1, 2], 2)) == first
    pool.release(second)
    pool.allocate(1)  # evicts the second: what is found must not go with it
    assert pool.lookup(hash_chain([1, 2], 2)) == first


def test_without_prefix_caching_nothing_is_found() -> None:
    pool = BlockPool(2, 1, prefix_caching=False)
    computed(pool, [1, 2])
    assert pool.lookup(hash_chain([1, 2], 1)) == []


@pytest.mark.parametrize(("num_tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_blocks_for_counts_begun_blocks(num_tokens: int, blocks: int) -> None:
    assert BlockPool(1, 4).blocks_for(num_tokens) == blocks


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0), (-1, 16)])
def test_an_empty_pool_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match=f"{num_blocks} blocks of {block_size}"):
        BlockPool(num_blocks, block_size)


def test_hashes_along_a_prompt_are_all_different() -> None:
    hashes = sorted(hash_chain([3] * 1000, 1))
    assert all(one != other for one, other in pairwise(hashes))
