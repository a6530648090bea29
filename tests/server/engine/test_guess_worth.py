"""Worth of guesses: a step has those that bring tokens faster than it would bring them without."""

from dataclasses import dataclass

import pytest

from persimmon.server.engine.acceptance import KIND_OF, LENGTHS, RECENT, Acceptance, first_rates
from persimmon.server.engine.guess_worth import MAX_STEPS_WITH_GUESSES, STEPS_TO_TRIAL, UNKNOWN_GUESSES, GuessWorth
from persimmon.server.engine.proposers import Proposal
from persimmon.server.engine.step_cost import ENOUGH, GuessCosts, StepCostModel, StepCosts, StepWork

QUIET = GuessCosts(step=1.0, decode=0.1, decode_context=0.0)


def costs(guesses: GuessCosts | None) -> StepCosts:
    return StepCosts(step=0, decode=0, decode_context=0, chunks=0, chunk_token=0, chunk_context=0, guesses=guesses)


def known(token: float, fixed: float = 0.0) -> StepCosts:
    return costs(GuessCosts(step=1.0, decode=0.1, decode_context=0.0, observed=True, fixed=fixed, token=token))


@dataclass(frozen=True)
class Likely:
    """Guesses of a known probability, whatever they follow."""

    p: float

    @property
    def rates(self) -> list[float]:
        return [self.p] * LENGTHS


def chosen(worth: GuessWorth, of: StepCosts | None, probabilities: list[float], proposed: int = 10) -> list[int]:
    """How many guesses each sequence has in a step."""
    if not worth.begin(of, len(probabilities), 0):
        return [0] * len(probabilities)
    proposal = Proposal(range(proposed), 1)
    counts = [worth.count(Likely(probability), proposal) for probability in probabilities]  # type: ignore[arg-type]
    return counts if worth.pays() else [0] * len(probabilities)


def begun(decodes: int = 1) -> GuessWorth:
    """After a step without guesses, which the first always is."""
    worth = GuessWorth()
    assert chosen(worth, known(0.1), [0.9] * decodes) == [0] * decodes
    return worth


@pytest.mark.parametrize("of", [None, costs(None)])
def test_no_guess_is_made_before_it_is_known_what_steps_take_without(of: StepCosts | None) -> None:
    worth = GuessWorth()
    assert [chosen(worth, of, [0.99]) for _ in range(3)] == [[0]] * 3


def test_likely_guesses_are_made_while_their_cost_is_unknown() -> None:
    assert chosen(begun(3), costs(QUIET), [0.95, 0.6, 0.4]) == [UNKNOWN_GUESSES, 1, 0]


def test_guesses_are_made_as_long_as_each_brings_more_than_it_costs() -> None:
    # A step of 1.1 s brings a token, so one of probability p ** n must cost less than p ** n * 1.1 s.
    assert chosen(begun(), known(0.11), [0.5]) == [3]
    assert chosen(begun(), known(0.11), [0.9], proposed=4) == [4]
    assert chosen(begun(), known(1.2), [0.99]) == [0]


def test_a_step_with_many_sequences_has_fewer_guesses() -> None:
    alone = sum(chosen(begun(), known(0.11), [0.5]))
    assert all(count < alone for count in chosen(begun(8), known(0.11), [0.5] * 8))


def test_what_guesses_cost_together_counts() -> None:
    assert chosen(begun(), known(0.11, fixed=0.1), [0.5]) == [3]
    assert chosen(begun(), known(0.11, fixed=2.0), [0.5]) == [0]


def test_a_guess_must_keep_up_with_the_others() -> None:
    worth = begun(2)
    assert chosen(worth, known(0.2), [0.95, 0.4], proposed=16)[1] == 1
    assert chosen(worth, known(0.2), [0.95, 0.4], proposed=16)[1] == 0


def test_steps_without_guesses_stay_known() -> None:
    worth = begun()
    steps = [chosen(worth, known(0.1), [0.9]) == [0] for _ in range(MAX_STEPS_WITH_GUESSES + 2)]
    assert steps.count(True) == 1
    assert chosen(worth, known(0.1), [0.9] * 9) == [0] * 9, "a batch of another size"
    assert sum(chosen(worth, known(0.1), [0.9] * 9)) > 0


def test_a_few_likely_guesses_are_tried_from_time_to_time_whatever_they_seem_to_cost() -> None:
    worth, probabilities = begun(8), [0.4] + [0.9] * 7
    tried = [sum(chosen(worth, known(50.0), probabilities)) for _ in range(4 * STEPS_TO_TRIAL)]
    assert 3 <= len([count for count in tried if count]) <= 4
    assert max(tried) == UNKNOWN_GUESSES
    assert not any(sum(chosen(worth, known(50.0), [0.4] * 8)) for _ in range(2 * STEPS_TO_TRIAL)), "unlikely ones"


def test_what_a_busy_machine_taught_about_guesses_is_unlearned_in_few_trials() -> None:
    model = StepCostModel()
    work = StepWork(decodes=2, decode_context=200, guess_tokens=UNKNOWN_GUESSES, guess_context=100 * UNKNOWN_GUESSES)
    quiet = StepWork(decodes=2, decode_context=200)
    for _ in range(2 * ENOUGH):
        model.observe(quiet, 0.010)
    for _ in range(50):
        model.observe(work, 0.400)
    for _ in range(15):
        for _ in range(STEPS_TO_TRIAL):
            model.observe(quiet, 0.010)
        model.observe(work, 0.012)
    learned = costs_of(model)
    assert learned is not None
    assert learned.seconds(work) < 0.005


def test_acceptance_follows_what_a_sequence_got() -> None:
    of_all = first_rates()
    good, bad = Acceptance(of_all), Acceptance(of_all)
    kind = KIND_OF[2]
    for _ in range(20):
        good.observe(kind, right=True)
        bad.observe(kind, right=False)
    assert good.rates[kind] > 0.9
    assert bad.rates[kind] < 0.2
    assert bad.rates[kind] < Acceptance(of_all).rates[kind] < good.rates[kind], "a new one begins in between"


def test_guesses_of_another_kind_are_judged_apart() -> None:
    acceptance = Acceptance(first_rates())
    for _ in range(20):
        acceptance.observe(KIND_OF[4], right=False)
    assert acceptance.rates[KIND_OF[4]] < 0.1
    others = [kind for kind in range(2 * LENGTHS) if kind != KIND_OF[4]]
    assert [acceptance.rates[kind] for kind in others] == [first_rates()[kind] for kind in others]


def test_guesses_from_recent_answers_are_of_other_kinds() -> None:
    worth = begun()
    assert worth.begin(known(0.1), 1, 0)
    acceptance = Acceptance(first_rates())
    for _ in range(40):
        acceptance.observe(KIND_OF[4], right=True)
        acceptance.observe(RECENT + KIND_OF[4], right=False)
    assert worth.count(acceptance, Proposal([5, 6], 4)) == 2
    assert worth.count(acceptance, Proposal([5, 6], 4, recent=True)) == 0


def test_what_guesses_cost_is_learned_from_steps_that_had_some() -> None:
    model = StepCostModel()
    assert costs_of(model) is None
    for _ in range(ENOUGH):
        model.observe(StepWork(decodes=2, decode_context=200), 0.010)
    unobserved = costs_of(model)
    assert unobserved is not None
    assert not unobserved.observed
    for count in [2, 5, 9, 14] * 5:
        work = StepWork(decodes=2, decode_context=200, guess_tokens=count, guess_context=100 * count)
        model.observe(work, 0.011 + 0.001 * count)
    work = StepWork(decodes=2, decode_context=200, guess_tokens=8, guess_context=800)
    observed = costs_of(model)
    assert observed is not None
    assert observed.seconds(work) == pytest.approx(0.009, rel=0.05)


def costs_of(model: StepCostModel) -> GuessCosts | None:
    return model.costs.guesses
