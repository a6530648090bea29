"""How often guesses are right, learned from what sequences got where tokens had been proposed.

Counts a proposal whether it was computed or not.  Knows neither what proposes guesses nor what they cost.
"""

from collections.abc import Sequence as Ids

from persimmon.server.engine.proposers import Proposal

PRIOR = 3.0
"""Observations of one sequence that what is known of all counts as."""

KEEP, KEEP_OF_ALL = 0.9, 0.99
"""What an observation still counts after one more, of a sequence and of all."""

KINDS = 6
"""Kinds of guesses, by how many tokens before them occurred before: 1, 2 or 3, 4 to 7, 8 to 15, 16 to 31, more."""


class Rates:
    """How often guesses of each kind were right; old observations fade.

    Args:
        keep: what an observation still counts after one more.
    """

    def __init__(self, keep: float) -> None:
        self._keep = keep
        self._right = [0.0] * KINDS
        self._tried = [0.0] * KINDS

    def probability(self, kind: int, prior: float) -> float:
        """How probable it is that a guess is right, if those before it are."""
        return (self._right[kind] + PRIOR * prior) / (self._tried[kind] + PRIOR)

    def count(self, kind: int, right: bool) -> None:
        """Takes notice of a guess."""
        self._right[kind] = self._keep * self._right[kind] + right
        self._tried[kind] = self._keep * self._tried[kind] + 1


class Acceptance:
    """How often one sequence's guesses are right.

    Args:
        of_all: what is known of all sequences, which learns from this one.
    """

    def __init__(self, of_all: Rates) -> None:
        self._of_all = of_all
        self._own = Rates(KEEP)
        self._start = 0
        self._guesses: Ids[int] = ()
        self._matched = 0

    def probability(self, matched: int) -> float:
        """How probable it is that a guess is right, if those before it are.

        Args:
            matched: tokens before it that occurred before it there too, right guesses among them; at least one.
        """
        kind = _kind(matched)
        # Before anything is known: the more tokens occurred before, the likelier is the next.
        of_all = self._of_all.probability(kind, 0.3 + 0.1 * kind)
        return self._own.probability(kind, of_all)

    def expect(self, proposal: Proposal, start: int) -> None:
        """Keeps what is proposed from position `start` on until it is known what came there."""
        self._start, self._guesses, self._matched = start, proposal.token_ids, proposal.matched

    def compare(self, token_ids: Ids[int]) -> None:
        """Learns from what came where something was proposed."""
        for place, (guess, token_id) in enumerate(zip(self._guesses, token_ids[self._start :], strict=False)):
            kind = _kind(self._matched + place)
            self._own.count(kind, guess == token_id)
            self._of_all.count(kind, guess == token_id)
            if guess != token_id:
                break
        self._guesses = ()


def _kind(matched: int) -> int:
    return min(matched.bit_length(), KINDS) - 1
