"""The rule that chooses an engine for a prompt, as properties over prompts, loads and caches."""

import os
import subprocess
import sys
from collections.abc import Sequence as Ids
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from persimmon.server.engine.blocks import BlockPool, block_hashes, hash_block
from persimmon.server.engine.routing import SEQUENCE_TOKENS, Route, Router
from persimmon.server.engine.sequence import Sequence

SIZE = 4
"""Tokens in a block."""

PREFIX = list(range(40 * SIZE))

prompts = st.lists(st.integers(0, 1), min_size=1, max_size=6 * SIZE)
"""Prompts that often share their first blocks."""


def full_blocks(token_ids: Ids[int], salt: bytes = b"") -> list[bytes]:
    return list(block_hashes(token_ids, SIZE, salt))


def router_with(engines: int, cached: Ids[int] = (), at: int = 0, salt: bytes = b"") -> Router:
    """A router of engines of which one has some tokens cached."""
    router = Router(engines, SIZE)
    router.change(at, full_blocks(cached, salt), [])
    return router


@given(token_ids=prompts, salt=st.binary(max_size=3))
def test_the_hashes_are_those_of_the_engines_sequences(token_ids: list[int], salt: bytes) -> None:
    sequence = Sequence(key=0, token_ids=token_ids * 5, max_tokens=1, cache_salt=salt)
    hashes = full_blocks(sequence.token_ids, salt)
    assert hashes == list(sequence.block_hashes(len(sequence.token_ids) // SIZE, SIZE))


def test_the_hashes_are_the_same_in_all_processes() -> None:
    program = "from persimmon.server.engine.blocks import *; print(*(h.hex() for h in block_hashes(range(8), 4, b's')))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    first = hash_block(b"s", range(4))
    assert printed == {f"{first.hex()} {hash_block(first, range(4, 8)).hex()}\n"}


@given(
    cached=st.lists(prompts, max_size=4),
    token_ids=prompts,
    loads=st.dictionaries(st.integers(0, 3), st.integers(0, 10_000), min_size=1),
)
def test_only_an_engine_that_serves_is_chosen(cached: list[list[int]], token_ids: list[int], loads: dict[int, int]):
    router = Router(4, SIZE)
    for engine, prompt in enumerate(cached):
        router.change(engine, full_blocks(prompt), [])
    assert router.route(token_ids, loads).engine in loads


def test_without_an_engine_that_serves_nothing_is_chosen() -> None:
    with pytest.raises(ValueError, match="no engine serves"):
        Router(2, SIZE).route([1], {})


@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=60), engines=st.integers(2, 5))
def test_without_prefixes_loads_differ_by_no_more_than_a_request(sizes: list[int], engines: int) -> None:
    router = Router(engines, SIZE)
    loads = dict.fromkeys(range(engines), 0)
    for number, size in enumerate(sizes):
        route = router.route([number] * size, loads)
        router.begin(route)
        loads[route.engine] += size + SEQUENCE_TOKENS
    assert max(loads.values()) - min(loads.values()) <= max(sizes) + SEQUENCE_TOKENS


@given(engines=st.integers(2, 6), first=st.integers(0, 10))
def test_equal_engines_are_chosen_in_turn(engines: int, first: int) -> None:
    router = Router(engines, SIZE, first=first)
    chosen = [router.route([number], dict.fromkeys(range(engines), 7)).engine for number in range(2 * engines)]
    assert chosen == [(first + number) % engines for number in range(2 * engines)]


@given(blocks=st.integers(1, 39), difference=st.integers(-50 * SIZE, 50 * SIZE), at=st.integers(0, 1))
def test_a_prefix_is_followed_unless_its_engine_is_busier_by_more_than_it_saves(
    blocks: int, difference: int, at: int
) -> None:
    router = router_with(2, PREFIX[: blocks * SIZE], at)
    loads = {at: 300 + difference, 1 - at: 300}
    route = router.route(PREFIX, loads)
    assert route.engine == (at if difference < blocks * SIZE else 1 - at)
    assert route.cached_tokens == (blocks * SIZE if route.engine == at else 0)


def test_the_longer_of_two_prefixes_is_followed() -> None:
    router = router_with(3, PREFIX[: 4 * SIZE], at=1)
    router.change(2, full_blocks(PREFIX[: 6 * SIZE]), [])
    assert router.route(PREFIX, {0: 0, 1: 0, 2: 0}).engine == 2
    assert router.route(PREFIX, {0: 0, 1: 0, 2: 3 * SIZE}).engine == 1


def test_the_last_token_is_always_computed() -> None:
    router = router_with(2, PREFIX[: 3 * SIZE])
    assert router.route(PREFIX[: 3 * SIZE], {0: 0}).cached_tokens == 2 * SIZE
    assert router.route(PREFIX[: 3 * SIZE + 1], {0: 0}).cached_tokens == 3 * SIZE
    assert router.route((), {0: 0}).cached_tokens == 0


@given(token_ids=prompts.map(lambda token_ids: token_ids * SIZE), salts=st.sets(st.binary(max_size=2), min_size=2))
def test_salts_do_not_mix(token_ids: list[int], salts: set[bytes]) -> None:
    one, other = sorted(salts)[:2]
    router = router_with(2, token_ids, salt=one)
    router.begin(router.route([*token_ids, *PREFIX], {0: 0}, one))
    assert router.route([*token_ids, *PREFIX], {0: 0}, other).cached_tokens == 0


class Indexes(RuleBasedStateMachine):
    """Pools whose blocks come and go, and a router that hears of it late; then it knows what the pools have."""

    @initialize(num_blocks=st.integers(2, 9))
    def create(self, num_blocks: int) -> None:
        self.pools = [BlockPool(num_blocks, SIZE, tracks_changes=True) for _ in range(2)]
        self.router = Router(2, SIZE)

    @rule(engine=st.integers(0, 1), token_ids=prompts)
    def compute(self, engine: int, token_ids: list[int]) -> None:
        pool = self.pools[engine]
        hashes = full_blocks(token_ids)[: pool.num_blocks]
        hits = pool.lookup(hashes)
        pool.share(hits)
        blocks = [*hits, *pool.allocate(len(hashes) - len(hits))]
        for block, block_hash in zip(blocks, hashes, strict=True):
            pool.index(block, block_hash)
        pool.release(blocks)

    @rule(engine=st.integers(0, 1), token_ids=prompts)
    def hear_and_route(self, engine: int, token_ids: list[int]) -> None:
        self.hear(engine)
        reusable = full_blocks(token_ids[:-1])
        assert self.router.route(token_ids, {engine: 0}).cached_tokens == SIZE * len(
            self.pools[engine].lookup(reusable)
        )

    @rule(engine=st.integers(0, 1))
    def end(self, engine: int) -> None:
        self.pools[engine] = BlockPool(self.pools[engine].num_blocks, SIZE, tracks_changes=True)
        self.router.forget(engine)
        assert self.router._cached[engine] == set()

    @rule(engine=st.integers(0, 1))
    def evict_all(self, engine: int) -> None:
        pool = self.pools[engine]
        pool.release(pool.allocate(pool.num_blocks))
        self.hear(engine)
        assert self.router._cached[engine] == set()

    def hear(self, engine: int) -> None:
        changes = self.pools[engine].take_changes()
        entered = [block_hash for block_hash, present in changes.items() if present]
        self.router.change(engine, entered, changes.keys() - entered)
        assert self.router._cached[engine] == set(self.pools[engine].indexed)

    @invariant()
    def no_more_is_known_than_the_pools_have_blocks(self) -> None:
        for engine, pool in enumerate(self.pools):
            assert len(self.router._cached[engine]) <= pool.num_blocks


TestIndexes = Indexes.TestCase
TestIndexes.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


@given(batches=st.lists(st.lists(st.integers(0, 50), max_size=12), max_size=12))
def test_of_a_larger_index_the_rest_is_not_known(batches: list[list[int]]) -> None:
    router = Router(2, SIZE, max_blocks=10)
    for batch in batches:
        router.change(0, [bytes([number]) for number in batch], [bytes([number + 1]) for number in batch])
        assert len(router._cached[0]) <= 10
    router.change(0, [], [bytes([number]) for number in range(52)])
    assert router._cached[0] == set()


def test_a_prompt_that_is_on_its_way_counts_as_a_prefix() -> None:
    router = Router(2, SIZE)
    first = router.route([*PREFIX, 1], {0: 0, 1: 0})
    router.begin(first)
    load = len(PREFIX) + 1
    follower = router.route([*PREFIX, 2, 3, 4, 5], {first.engine: load, 1 - first.engine: load})
    assert (follower.engine, follower.cached_tokens) == (first.engine, len(PREFIX))
    other = router.route([9, *PREFIX], {first.engine: load, 1 - first.engine: load})
    assert other.cached_tokens == 0
    router.end(first)
    assert router.route([*PREFIX, 2], {0: 0, 1: 0}).cached_tokens == 0


def test_a_burst_with_one_prefix_has_it_computed_once_at_each_engine_and_is_balanced() -> None:
    router = Router(2, SIZE)
    loads = {0: 0, 1: 0}
    computed = []
    for number in range(12):
        route = router.route([*PREFIX, number], loads)
        router.begin(route)
        computed.append(len(PREFIX) + 1 - route.cached_tokens)
        loads[route.engine] += computed[-1] + SEQUENCE_TOKENS
    assert computed == [len(PREFIX) + 1] * 2 + [1] * 10
    assert abs(loads[0] - loads[1]) <= SEQUENCE_TOKENS + 1


@given(
    requests=st.lists(st.tuples(prompts, st.booleans()), max_size=20),
    order=st.randoms(use_true_random=False),
    killed=st.sets(st.integers(0, 2)),
)
def test_no_prompt_is_on_its_way_when_all_requests_have_ended(
    requests: list[tuple[list[int], bool]], order: Random, killed: set[int]
) -> None:
    router = Router(3, SIZE)
    routes: list[Route] = []
    for token_ids, ends in requests:
        route = router.route(token_ids, {0: 0, 1: 0, 2: 0})
        router.begin(route)
        routes.append(route)
        if ends:
            router.end(routes.pop(order.randrange(len(routes))))
    for engine in killed:
        router.forget(engine)
    for route in routes:
        router.end(route)
    assert router._coming == {}
