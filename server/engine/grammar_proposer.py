"""Guesses for a sequence that follows a grammar: what the grammar forces, and what else is guessed.

Knows token ids only; what is forced is found by others.
"""

from collections.abc import Sequence
from typing import Protocol

from persimmon.server.engine.acceptance import FORCED, Acceptance
from persimmon.server.engine.proposers import NO_PROPOSAL, Proposal, Proposer


class ForcedTokens(Protocol):
    """Finds what the grammar of a sequence forces."""

    def guess(self, token_ids: Sequence[int], count: int, others: Sequence[int]) -> tuple[Sequence[int], int]:
        """Tokens that may come next, where text is forced.

        Args:
            token_ids: the sequence: the tokens of the last call, and those that came since.
            count: maximum number of guesses; at least 1.
            others: guesses that were made without the grammar.

        Returns:
            The guesses, and how many of the first are forced; no guesses where nothing is.
        """
        ...


class GrammarProposer:
    """What a grammar forces; where it forces nothing, what another proposer guesses.

    Args:
        forced: finds what is forced.
        other: guesses without the grammar; None where nothing does.
        acceptance: learns whether the forced tokens come; None where nothing does.

    Attributes:
        other: as given.
    """

    def __init__(self, forced: ForcedTokens, other: Proposer | None, acceptance: Acceptance | None = None) -> None:
        self.other = other
        self._forced = forced
        self._acceptance = acceptance
        # The forced tokens of the last proposal, and where it began.
        self._expected: Sequence[int] = ()
        self._start = 0

    def propose(self, token_ids: Sequence[int], count: int) -> Proposal:
        """As `Proposer.propose`."""
        self._learn(token_ids)
        other = NO_PROPOSAL if self.other is None else self.other.propose(token_ids, count)
        guesses, forced = self._forced.guess(token_ids, count, other.token_ids)
        if not guesses:
            return other
        self._start, self._expected = len(token_ids), guesses[:forced]
        return other._replace(token_ids=guesses, forced=forced)

    def _learn(self, token_ids: Sequence[int]) -> None:
        if self._acceptance is not None:
            for expected, token_id in zip(self._expected, token_ids[self._start :], strict=False):
                self._acceptance.observe(FORCED, right=expected == token_id)
                if expected != token_id:
                    break
        self._expected = ()
