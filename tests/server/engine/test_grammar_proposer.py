"""Guesses for a sequence that follows a grammar: what is forced comes first, and others' guesses where nothing is."""

from collections.abc import Sequence as Ids
from dataclasses import dataclass

from persimmon.server.engine.acceptance import FORCED, KIND_OF, Acceptance, first_rates
from persimmon.server.engine.grammar_proposer import GrammarProposer
from persimmon.server.engine.guess_worth import GuessWorth
from persimmon.server.engine.proposers import NO_PROPOSAL, Proposal
from persimmon.server.engine.step_cost import GuessCosts, StepCosts

CHEAP = StepCosts(
    step=1,
    decode=0,
    decode_context=0,
    chunks=0,
    chunk_token=0,
    chunk_context=0,
    guesses=GuessCosts(step=1, decode=0, decode_context=0, observed=True, token=0.3),
)


@dataclass
class Forced:
    """Forces some tokens after a sequence of a length."""

    num_tokens: int
    tokens: list[int]

    def guess(self, token_ids: Ids[int], count: int, others: Ids[int]) -> tuple[Ids[int], int]:
        if len(token_ids) != self.num_tokens:
            return (), 0
        return [*self.tokens, *others][:count], min(count, len(self.tokens))


@dataclass
class Fixed:
    """Proposes the same in every step."""

    proposal: Proposal

    def propose(self, token_ids: Ids[int], count: int) -> Proposal:
        return self.proposal


def test_without_forced_text_guesses_are_those_of_the_other_proposer() -> None:
    proposal = Proposal([7, 8], 3)
    assert GrammarProposer(Forced(5, [1]), Fixed(proposal)).propose([9] * 4, 6) is proposal
    assert GrammarProposer(Forced(5, [1]), None).propose([9] * 4, 6) is NO_PROPOSAL


def test_forced_tokens_come_first() -> None:
    forced = Forced(5, [1, 2])
    assert GrammarProposer(forced, None).propose([9] * 5, 3) == Proposal([1, 2], 0, forced=2)
    other = Fixed(Proposal([7, 8], 3, recent=True))
    assert GrammarProposer(forced, other).propose([9] * 5, 3) == Proposal([1, 2, 7], 3, recent=True, forced=2)


def test_how_often_forced_tokens_are_right_is_learned_apart() -> None:
    acceptance = Acceptance(first_rates())
    before = list(acceptance.rates)
    proposer = GrammarProposer(Forced(2, [1, 2, 3]), Fixed(Proposal([7], 3)), acceptance)
    proposer.propose([9, 9], 4)
    proposer.propose([9, 9, 1], 4)
    assert acceptance.rates[FORCED] > before[FORCED]
    proposer = GrammarProposer(Forced(2, [1, 2, 3]), Fixed(Proposal([7], 3)), acceptance)
    for _ in range(20):
        proposer.propose([9, 9], 4)
        proposer.propose([9, 9, 5, 2, 3], 4)
    assert acceptance.rates[FORCED] < 0.2
    assert acceptance.rates[:FORCED] == before[:FORCED]


def test_what_follows_forced_tokens_is_worth_less_than_they_are() -> None:
    worth = GuessWorth()
    acceptance = worth.acceptance()
    for _ in range(50):
        acceptance.observe(FORCED, right=True)
        acceptance.observe(KIND_OF[5], right=False)
    counts = []
    for _ in range(2):  # the first step of a batch of another size has no guesses
        worth.begin(CHEAP, 1, 0)
        counts.append(
            worth.count(acceptance, Proposal([1, 2, 3, 7, 8], 2, forced=3)) if worth.begin(CHEAP, 1, 0) else 0
        )
    assert counts[-1] == 3
