"""Guesses on a GPU, where steps overlap and those with guesses are small: which steps have some, and which wait."""

import pytest

from persimmon.server.engine.step_cost import GuessCosts, StepCosts
from tests.server.engine.fake_model import OneProposal
from tests.server.engine.simulation import Simulation


def simulation(*, max_guesses: int = 4, adaptive: bool = False, max_guess_rows: int | None = None) -> Simulation:
    """Steps overlap, and most guesses are right."""
    return Simulation(
        num_blocks=60,
        block_size=4,
        max_model_len=60,
        max_num_seqs=4,
        overlap=True,
        max_guesses=max_guesses,
        right_in_a_row=20,
        adaptive=adaptive,
        max_guess_rows=max_guess_rows,
    )


def costs(guess: float) -> StepCosts:
    """Where a step with guesses takes that much longer for each of them."""
    known = GuessCosts(step=1, decode=0.1, decode_context=0, observed=True, token=guess)
    return StepCosts(step=1, decode=0.1, decode_context=0, chunks=0.1, chunk_token=0.1, chunk_context=0, guesses=known)


class TestAStepIsPlannedAhead:
    def test_unless_tokens_are_expected_behind_the_one_that_is_drawn(self) -> None:
        guessing = simulation()
        guessing.add([0, 1], 20)
        guessing.plan()
        assert guessing.try_plan() is None
        guessing.commit()
        assert guessing.plan().num_guesses == 4
        guessing.drain()

    def test_where_nothing_is_proposed(self) -> None:
        guessing = simulation()
        sequence = guessing.add([0, 1], 20)
        guessing.plan()
        sequence.proposer = OneProposal(num_tokens=99, guesses=[0])
        for _ in range(6):
            assert guessing.plan().num_guesses == 0
            guessing.commit()
        guessing.drain()

    def test_where_the_limit_on_tokens_leaves_no_room_for_guesses(self) -> None:
        guessing = simulation()
        guessing.add([0, 1], 2)
        guessing.plan()
        assert guessing.plan().num_tokens == 1
        guessing.drain()

    def test_where_guesses_do_not_pay(self) -> None:
        guessing = simulation(adaptive=True)
        guessing.costs = costs(guess=5)
        guessing.add([0, 1], 20)
        guessing.plan()
        for _ in range(10):
            assert guessing.plan().num_guesses == 0
            guessing.commit()
        guessing.drain()

    def test_but_not_where_they_may_pay(self) -> None:
        guessing = simulation(adaptive=True)
        guessing.costs = costs(guess=0.01)
        guessing.add([0, 1], 20)
        guessing.plan()
        waited = 0
        for _ in range(6):
            if guessing.try_plan() is None:
                waited += 1
                guessing.commit()
                guessing.plan()
            else:
                guessing.commit()
        assert waited > 0
        assert guessing.stats.accepted_tokens > 0
        guessing.drain()


class TestWhereStepsWithGuessesAreSmall:
    @pytest.mark.parametrize(("max_guess_rows", "guesses"), [(6, [3, 0, 0]), (9, [4, 2, 0]), (15, [4, 4, 4])])
    def test_their_tokens_are_at_most_as_many_as_allowed(self, max_guess_rows: int, guesses: list[int]) -> None:
        guessing = simulation(max_guess_rows=max_guess_rows)
        for token in range(3):
            guessing.add([token] * 2, 20)
        guessing.plan()
        guessing.commit()
        assert [len(item.guesses) for item in guessing.plan().scheduled] == guesses
        guessing.commit()
        guessing.drain()

    @pytest.mark.parametrize("max_guess_rows", [0, 1])
    def test_there_are_none_where_no_room_is_left_beside_the_sequences(self, max_guess_rows: int) -> None:
        guessing = simulation(max_guess_rows=max_guess_rows)
        guessing.add([0, 1], 20)
        guessing.plan()
        assert guessing.plan().num_guesses == 0
        guessing.commit()
        guessing.drain()
        assert guessing.stats.drafts == 0

    def test_there_are_none_beside_a_prompt(self) -> None:
        guessing = simulation(max_guess_rows=64)
        guessing.add([0, 1], 20)
        guessing.plan()
        guessing.commit()
        guessing.add([2] * 5, 3)
        plan = guessing.plan()
        assert (plan.num_guesses, plan.work.chunk_tokens) == (0, 5)
        guessing.commit()
        assert guessing.plan().num_guesses > 0
        guessing.commit()
        guessing.drain()

    def test_those_that_wait_for_a_place_do_not_hold_guesses_up(self) -> None:
        guessing = simulation(max_guess_rows=64)
        for token in range(6):
            guessing.add([token % 3, token % 2], 20)
        guessing.plan()
        guessing.commit()
        assert guessing.stats.waiting == 2
        assert guessing.plan().num_guesses > 0
        guessing.commit()
        guessing.drain()
