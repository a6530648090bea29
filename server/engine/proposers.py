"""Which tokens may come next, guessed from what a sequence and recent answers hold already.

Answers quote and edit their prompts, and repeat themselves and each other.  So where the last tokens occurred before,
what followed them then is likely to follow again.  Knows token ids only: neither what a guess costs nor what becomes of
it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from persimmon.server.engine.acceptance import KIND_OF, RECENT, Acceptance
from persimmon.server.engine.guess_memory import GuessMemory
from persimmon.server.engine.token_index import TokenIndex

MAX_MATCHED = 32
"""Last tokens that are compared with earlier ones, at most."""


class Proposal(NamedTuple):
    """Tokens that may follow.

    Attributes:
        token_ids: the tokens, in order.
        matched: how many of the last tokens occurred before, where these followed them.
        recent: whether that was in a recent answer; else in the sequence itself.
        forced: how many of the first spell text that a grammar forces, whatever occurred before.
    """

    token_ids: Sequence[int]
    matched: int
    recent: bool = False
    forced: int = 0


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


@dataclass(frozen=True, slots=True)
class Lookup:
    """What is looked for, and how much of what followed it is proposed.

    Attributes:
        max_guesses: most tokens of a proposal.
        shortest: the least number of last tokens that must have occurred before; at least 1.
        longest: how many of them are compared, at most.
        as_many_as_matched: whether a proposal has no more tokens than match, because a short match says little.
    """

    max_guesses: int
    shortest: int = 1
    longest: int = MAX_MATCHED
    as_many_as_matched: bool = False


class LookupProposer:
    """What followed an earlier occurrence of a sequence's last tokens.

    As long as the tokens come that it expects, it goes on where it is.  When others came, it looks for the place where
    most of the last tokens occurred before (`TokenIndex.find`): in the answer, in the prompt if more match there, and
    in recent answers of its cache salt if more match there than in both.  Each token takes a bounded number of
    operations, however long the sequence is.

    Args:
        lookup: what is looked for.
        memory: what the proposers of an engine share.
        prompt: of the sequence, which samples of one prompt share; it may lack tokens yet.
        prompt_length: tokens of the prompt.
        max_tokens: tokens that may follow it.
        salt: the cache salt; recent answers of another are not looked at.
        acceptance: learns whether the expected tokens come; None where nothing does.

    Attributes:
        prompt: as given.
    """

    def __init__(
        self,
        lookup: Lookup,
        memory: GuessMemory,
        *,
        prompt: TokenIndex,
        prompt_length: int,
        max_tokens: int,
        salt: bytes = b"",
        acceptance: Acceptance | None = None,
    ) -> None:
        self.prompt = prompt
        self._lookup = lookup
        self._memory = memory
        self._prompt_length = prompt_length
        self._answer = memory.index(max_tokens, known=prompt_length)
        self._salt = salt
        self._acceptance = acceptance
        # What a recent answer lets expect; None where the sequence itself does.
        self._expected: Sequence[int] | None = None
        # Where in it the next token is expected, and how many of the last ones match the tokens before it; 0 for none.
        self._place = self._matched = 0

    def propose(self, token_ids: Sequence[int], count: int) -> Proposal:
        """As `Proposer.propose`; nothing as long as the steps so far had no time to take in the whole sequence."""
        if not self._take_in(token_ids):
            return NO_PROPOSAL
        lookup, matched = self._lookup, self._matched
        if matched < lookup.shortest:
            return NO_PROPOSAL
        count = min(count, lookup.max_guesses, matched if lookup.as_many_as_matched else count)
        place = self._place
        if self._expected is not None:
            return Proposal(self._expected[place : place + count], matched, recent=True)
        return Proposal(_continued(token_ids, place, count), matched)

    def _take_in(self, token_ids: Sequence[int]) -> bool:
        """Takes in the tokens that came since the last call; whether those were all."""
        answer, total = self._answer, len(token_ids)
        if self.prompt.known < self._prompt_length:
            self.prompt.add(token_ids, self._memory.spend(self.prompt.known, self._prompt_length))
            if self.prompt.known < self._prompt_length:
                return False
        known = answer.known
        if known == total:
            return True
        end = self._memory.spend(known, total)
        if self._matched:
            self._follow(token_ids, known, end)
        if end < total:
            answer.add(token_ids, end)
            return False
        if not self._matched:
            if total - known > 1:
                answer.add(token_ids, total - 1)
            self._find(token_ids, total)
        answer.add(token_ids, total)
        return True

    def _follow(self, token_ids: Sequence[int], begin: int, end: int) -> None:
        """Goes on over new tokens as long as they are the expected ones."""
        expected, acceptance, longest = self._expected, self._acceptance, self._lookup.longest
        source, first = (token_ids, 0) if expected is None else (expected, RECENT)
        place, matched = self._place, self._matched
        for token_id in token_ids[begin:end]:
            right = source[place] == token_id
            if acceptance is not None:
                acceptance.observe(first + KIND_OF[matched], right=right)
            place += 1
            if not right or place == len(source):
                matched = 0
                break
            if matched < longest:
                matched += 1
        self._place, self._matched = place, matched

    def _find(self, token_ids: Sequence[int], end: int) -> None:
        """Looks for where most of the last tokens before `end` occurred before."""
        longest = self._lookup.longest
        place, matched = self._answer.find(token_ids, token_ids, end, longest)
        in_prompt, matched = self.prompt.find(token_ids, token_ids, end, longest, matched)
        self._expected, self._place, self._matched = None, in_prompt or place, matched
        answers = self._memory.answers(self._salt)
        if answers is not None:
            followed, matched = answers.find(token_ids, end, longest, matched)
            if followed:
                self._expected, self._place, self._matched = followed, 0, matched


def _continued(token_ids: Sequence[int], end: int, count: int) -> Sequence[int]:
    """The tokens from `end` on; where the sequence ends too soon, it goes on as it did from there."""
    guesses = token_ids[end : end + count]
    if len(guesses) == count:
        return guesses
    period = token_ids[end:]
    return (list(period) * (1 + count // len(period)))[:count]
