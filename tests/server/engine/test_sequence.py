"""A sequence counts its tokens, knows when it ends, and names its blocks by all that came before them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persimmon.server.engine.blocks import ROOT_HASH, hash_block
from persimmon.server.engine.sequence import Sequence


def sequence(prompt: list[int], max_tokens: int = 8, stops: frozenset[int] = frozenset()) -> Sequence:
    return Sequence(key="a", token_ids=prompt, max_tokens=max_tokens, stop_token_ids=stops)


def test_a_new_sequence_has_a_prompt_and_nothing_else() -> None:
    new = sequence([5, 6, 7])
    assert (new.prompt_length, new.num_tokens, new.num_output_tokens, new.num_uncomputed) == (3, 3, 0, 3)
    assert new.block_table == []
    assert new.cached_tokens is None
    assert not new.finished


def test_output_tokens_are_counted_apart_from_the_prompt() -> None:
    running = sequence([5, 6, 7])
    running.append(8)
    running.num_computed = 3
    assert running.token_ids == [5, 6, 7, 8]
    assert (running.prompt_length, running.num_tokens, running.num_output_tokens) == (3, 4, 1)
    assert running.num_uncomputed == 1


def test_it_ends_by_length_at_max_tokens() -> None:
    running = sequence([5], max_tokens=2)
    assert not running.append(6)
    assert running.finish_reason is None
    assert running.append(6)
    assert running.finish_reason == "length"


def test_it_ends_at_a_stop_token_and_keeps_it() -> None:
    running = sequence([5], stops=frozenset({9, 10}))
    assert not running.append(6)
    assert running.append(10)
    assert running.finish_reason == "stop"
    assert running.token_ids == [5, 6, 10]


def test_a_stop_token_at_max_tokens_is_a_stop() -> None:
    running = sequence([5], max_tokens=1, stops=frozenset({9}))
    assert running.append(9)
    assert running.finish_reason == "stop"


def test_a_stop_token_in_the_prompt_ends_nothing() -> None:
    running = sequence([9, 9], stops=frozenset({9}))
    assert not running.append(1)


def test_sequences_are_equal_only_to_themselves() -> None:
    assert sequence([1]) != sequence([1])


@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_block_hashes_are_the_chain_over_full_blocks(block_size: int) -> None:
    prompt = list(range(12))
    chain, parent = [], ROOT_HASH
    for start in range(0, 12, block_size):
        parent = hash_block(parent, prompt[start : start + block_size])
        chain.append(parent)
    named = sequence(prompt)
    assert list(named.block_hashes(2, block_size)) == chain[:2]
    assert list(named.block_hashes(12 // block_size, block_size)) == chain
    assert list(named.block_hashes(1, block_size)) == chain[:1]


def test_prompts_of_different_salts_share_no_block() -> None:
    chains = [
        Sequence("key", list(range(8)), 1, cache_salt=salt).block_hashes(2, 4) for salt in (b"", b"a", b"b", b"a")
    ]
    assert chains[1] == chains[3]
    assert len({block for chain in chains for block in chain}) == 6


@settings(deadline=None)
@given(prompt=st.lists(st.integers(0, 2), min_size=6, max_size=6), outputs=st.lists(st.integers(0, 2), max_size=6))
def test_block_hashes_do_not_depend_on_when_a_token_became_known(prompt: list[int], outputs: list[int]) -> None:
    grown = sequence(list(prompt), max_tokens=100)
    for token in outputs:
        grown.block_hashes(grown.num_tokens // 2, 2)
        grown.append(token)
    full_blocks = grown.num_tokens // 2
    assert grown.block_hashes(full_blocks, 2) == sequence(prompt + outputs).block_hashes(full_blocks, 2)


TOKENS = st.lists(st.integers(0, 2**18 - 1), min_size=1, max_size=6)
PARENTS = st.just(ROOT_HASH) | st.binary(min_size=32, max_size=32)


@settings(deadline=None)
@given(one=st.tuples(PARENTS, TOKENS), other=st.tuples(PARENTS, TOKENS))
def test_blocks_share_a_hash_only_with_the_same_tokens_after_the_same_prefix(
    one: tuple[bytes, list[int]], other: tuple[bytes, list[int]]
) -> None:
    assert (hash_block(*one) == hash_block(*other)) == (one == other)
