"""Proposers: what followed the longest suffix that occurred before, as a search through the whole sequence finds it."""

from collections.abc import Sequence as Ids

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persimmon.server.engine.proposers import MAX_INDEXED, NgramProposer, Proposer, SuffixProposer

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=40)
PIECES = st.lists(TOKENS, min_size=1, max_size=8)


def ends_of(token_ids: Ids[int], length: int) -> list[int]:
    """Where the last `length` tokens ended before, the earliest first."""
    suffix = token_ids[len(token_ids) - length :]
    return [end for end in range(length, len(token_ids)) if token_ids[end - length : end] == suffix]


def continued(token_ids: list[int], end: int, count: int) -> list[int]:
    """What follows from `end` on; the sequence itself goes on as it does from there."""
    known = list(token_ids)
    for place in range(count):
        known.append(known[end + place])
    return known[len(token_ids) :]


def proposals(proposer: Proposer, pieces: list[list[int]], count: int) -> list[tuple[list[int], list[int]]]:
    """The sequence and what is proposed after each piece of it."""
    known: list[int] = []
    found = []
    for piece in pieces:
        known += piece
        found.append((list(known), list(proposer.propose(known, count).token_ids)))
    return found


@given(pieces=PIECES, shortest=st.integers(1, 3), more=st.integers(0, 3), count=st.integers(1, 9))
def test_ngram_proposes_what_followed_the_last_occurrence_of_the_longest_ngram(
    pieces: list[list[int]], shortest: int, more: int, count: int
) -> None:
    proposer = NgramProposer(6, shortest, shortest + more)
    for known, proposed in proposals(proposer, pieces, count):
        lengths = [n for n in range(shortest, shortest + more + 1) if n < len(known) and ends_of(known, n)]
        expected = continued(known, ends_of(known, lengths[-1])[-1], min(6, count)) if lengths else []
        assert proposed == expected


@given(pieces=PIECES, count=st.integers(1, 9))
def test_suffix_proposes_what_followed_an_occurrence_of_the_longest_suffix(pieces: list[list[int]], count: int) -> None:
    for known, proposed in proposals(SuffixProposer(6), pieces, count):
        longest = max((n for n in range(1, len(known)) if ends_of(known, n)), default=0)
        expected = [continued(known, end, min(6, count, longest)) for end in ends_of(known, longest)]
        assert proposed in expected if longest else not proposed


def test_suffix_prefers_what_followed_lately() -> None:
    proposer = SuffixProposer(3)
    known = [1, 2, 3, 1, 2]
    assert list(proposer.propose(known, 1).token_ids) == [3]
    known += [4, 1, 2]
    assert list(proposer.propose(known, 1).token_ids) == [4]


@pytest.mark.parametrize("proposer", [NgramProposer(5, 2, 4), SuffixProposer(5)], ids=["ngram", "suffix"])
def test_a_long_prompt_is_taken_in_piece_by_piece(proposer: Proposer) -> None:
    known = [*range(MAX_INDEXED), 5, 6, 7]
    assert list(proposer.propose(known, 3).token_ids) == []
    assert list(proposer.propose(known, 3).token_ids) == [8, 9, 10]


@pytest.mark.parametrize("proposer", [NgramProposer(5, 2, 4), SuffixProposer(5)], ids=["ngram", "suffix"])
def test_nothing_is_proposed_where_nothing_repeats(proposer: Proposer) -> None:
    assert list(proposer.propose(list(range(50)), 5).token_ids) == []
