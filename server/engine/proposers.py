"""Which tokens may come next, guessed from what a sequence holds already.

Answers quote and edit their prompts and repeat themselves.  So where the last tokens occurred before, what followed
them then is likely to follow again.  Knows token ids only: neither what a guess costs nor whether it was right.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

MAX_INDEXED = 1024
"""Tokens that a proposer takes in at once, in about two milliseconds.  It guesses nothing until it has taken in all, so
that a long prompt does not hold up a step."""


class Proposal(NamedTuple):
    """Tokens that may follow.

    Attributes:
        token_ids: the tokens, in order.
        matched: how many of the last tokens occurred before, where these followed them.
    """

    token_ids: Sequence[int]
    matched: int


NO_PROPOSAL = Proposal((), 0)
"""Nothing suggests what may follow."""


class Proposer(Protocol):
    """Guesses for one sequence."""

    def propose(self, token_ids: Sequence[int], count: int) -> Proposal:
        """Tokens that may follow.

        Args:
            token_ids: the sequence: the tokens of the last call, and those that came since.
            count: at most this many, at least one.
        """
        ...


class NgramProposer:
    """What followed the last occurrence of the longest n-gram that the sequence ends with ('prompt lookup').

    It takes some 200 bytes for each token and length.

    Args:
        max_guesses: most tokens of a proposal.
        shortest: the least n; at least 1.
        longest: the greatest n.
    """

    def __init__(self, max_guesses: int, shortest: int, longest: int) -> None:
        self._max_guesses = max_guesses
        self._known = 0
        # By n, the shortest first: where each n-gram ended last, but for those that the sequence ends with.
        self._ends: list[tuple[int, dict[tuple[int, ...], int]]] = [(n, {}) for n in range(shortest, longest + 1)]

    def propose(self, token_ids: Sequence[int], count: int) -> Proposal:
        """As `Proposer.propose`."""
        known = min(len(token_ids), self._known + MAX_INDEXED)
        for end in range(max(1, self._known), known):
            for n, ends in self._ends:
                if n > end:
                    break
                ends[tuple(token_ids[end - n : end])] = end
        self._known = known
        if known < len(token_ids):
            return NO_PROPOSAL
        last = matched = 0
        for n, ends in self._ends:
            found = ends.get(tuple(token_ids[-n:]))
            if found is None:
                break  # then longer ones did not occur either
            last, matched = found, n
        if not matched:
            return NO_PROPOSAL
        return Proposal(_continued(token_ids, last, min(count, self._max_guesses)), matched)


class SuffixProposer:
    """What followed an earlier occurrence of the longest suffix that has one, however long that is.

    It is the last occurrence for which no longer suffix occurred before, or else the first.

    A suffix automaton finds it ([Blumer et al., 1985](https://doi.org/10.1016/0304-3975(85)90157-4)).  It has at most
    two states a token, some 700 bytes.

    Args:
        max_guesses: most tokens of a proposal.
        as_many_as_matched: whether it has at most as many tokens as the suffix, because a short one says little.
    """

    def __init__(self, max_guesses: int, *, as_many_as_matched: bool = True) -> None:
        self._max_guesses = max_guesses
        self._as_many_as_matched = as_many_as_matched
        self._known = 0
        # Of each state: where tokens lead, the state of the longest suffix that occurs elsewhere too, the length of its
        # longest string, and where that first ended.
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._end = [0]
        self._last = 0
        # Where the longest suffix that occurred before ended then.
        self._found = 0

    def propose(self, token_ids: Sequence[int], count: int) -> Proposal:
        """As `Proposer.propose`."""
        for token_id in token_ids[self._known : self._known + MAX_INDEXED]:
            self._append(token_id)
        if self._known < len(token_ids):
            return NO_PROPOSAL
        suffix = self._link[self._last]
        if suffix <= 0:
            return NO_PROPOSAL
        matched = self._length[suffix]
        count = min(count, self._max_guesses)
        if self._as_many_as_matched:
            count = min(count, matched)
        return Proposal(_continued(token_ids, self._found, count), matched)

    def _append(self, token_id: int) -> None:
        self._extend(token_id)
        suffix = self._link[self._last]
        self._found, self._end[suffix] = self._end[suffix], self._known

    def _extend(self, token_id: int) -> None:
        self._known += 1
        state = self._new({}, self._length[self._last] + 1, self._known)
        before, self._last = self._last, state
        while before >= 0 and token_id not in self._next[before]:
            self._next[before][token_id] = state
            before = self._link[before]
        if before < 0:
            self._link[state] = 0
            return
        there = self._next[before][token_id]
        if self._length[there] == self._length[before] + 1:
            self._link[state] = there
            return
        # The strings of `there` do not all end where this one does any more.
        clone = self._new(dict(self._next[there]), self._length[before] + 1, self._end[there])
        self._link[clone] = self._link[there]
        self._link[there] = self._link[state] = clone
        while before >= 0 and self._next[before].get(token_id) == there:
            self._next[before][token_id] = clone
            before = self._link[before]

    def _new(self, next_states: dict[int, int], length: int, end: int) -> int:
        self._next.append(next_states)
        self._link.append(0)
        self._length.append(length)
        self._end.append(end)
        return len(self._next) - 1


def _continued(token_ids: Sequence[int], end: int, count: int) -> Sequence[int]:
    """The tokens from `end` on; where the sequence ends too soon, it goes on as it did from there."""
    guesses = token_ids[end : end + count]
    if len(guesses) == count:
        return guesses
    period = token_ids[end:]
    return (list(period) * (1 + count // len(period)))[:count]
