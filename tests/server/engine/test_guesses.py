"""Guesses in the scheduler: which tokens of a step count, and which guesses a step has room for."""

import pytest

from tests.server.engine.fake_model import STEMS, VOCABULARY, generate_alone
from tests.server.engine.simulation import Simulation


@pytest.mark.parametrize("right", range(6))
def test_guesses_count_up_to_the_first_wrong_one(right: int) -> None:
    simulation = Simulation(num_blocks=20, block_size=4, max_model_len=40)
    sequence = simulation.add(STEMS[0][:6], 20)
    simulation.step()
    simulation.guess(0, 5, wrong_at=right)
    plan = simulation.step()
    assert plan.num_tokens == 6
    # The token that is drawn at the wrong one, and so the right one there, counts too.
    assert sequence.num_output_tokens == 1 + right + 1
    assert len(sequence.block_table) == simulation.pool.blocks_for(sequence.num_computed), "the others are given back"
    simulation.drain()
    assert simulation.finished[0].num_output_tokens == 20


def test_only_blocks_of_tokens_that_count_are_found_again() -> None:
    simulation = Simulation(num_blocks=20, block_size=4, max_model_len=40)
    sequence = simulation.add(STEMS[0][:6], 14)
    simulation.step()
    simulation.guess(0, 8, wrong_at=3)
    simulation.step()
    simulation.guess(0, 3)
    simulation.step()
    known = list(sequence.token_ids)
    simulation.drain()
    again = simulation.add(known, 1)
    simulation.step()
    assert again.cached_tokens == (len(known) - 1) // 4 * 4


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_no_guess_is_computed_beyond_the_last_token_that_a_sequence_may_have(limit: int) -> None:
    simulation = Simulation(num_blocks=20, block_size=4, max_model_len=40)
    sequence = simulation.add([0], limit + 1)
    simulation.step()
    simulation.guess(0, 9)
    assert simulation.step().num_tokens == limit
    assert (sequence.num_output_tokens, sequence.finish_reason) == (limit + 1, "length")


def test_a_stop_token_among_right_guesses_is_the_last_one() -> None:
    prompt = STEMS[0][:5]
    answer = generate_alone(prompt, 20)[0]
    stop = next(token for token in range(VOCABULARY) if token != answer[0] and token in answer[1:6])
    simulation = Simulation(num_blocks=20, block_size=4, max_model_len=40)
    sequence = simulation.add(prompt, 20, {stop})
    simulation.step()
    simulation.guess(0, 8)
    simulation.step()
    assert sequence.token_ids[5:] == generate_alone(prompt, 20, {stop})[0]
    assert simulation.pool.num_free == simulation.pool.num_blocks


def test_guesses_take_no_block_that_a_running_sequence_needs() -> None:
    simulation = Simulation(num_blocks=6, block_size=1, max_model_len=6, max_num_seqs=2)
    first, second = simulation.add([0], 3), simulation.add([1], 3)
    simulation.step()
    simulation.guess(0, 2)
    simulation.guess(1, 2)
    simulation.step()
    assert simulation.stats.preemptions == 0
    assert min(first.num_output_tokens, second.num_output_tokens) >= 2


def test_a_draw_that_depends_on_the_tokens_before_it_is_made_at_guesses_too() -> None:
    simulation = Simulation(num_blocks=20, block_size=4, max_model_len=40)
    simulation.add([0, 1], 8, penalized=True)
    simulation.step()
    simulation.guess(0, 4)
    assert simulation.step().num_tokens == 5


def test_guesses_leave_a_token_for_each_sequence_that_may_run() -> None:
    simulation = Simulation(num_blocks=20, block_size=4, max_model_len=40, max_num_seqs=3, max_num_batched_tokens=5)
    simulation.add([0], 8)
    simulation.step()
    simulation.guess(0, 4)
    assert simulation.step().num_tokens == 1 + 2


def test_samples_of_one_prompt_begin_without_guesses() -> None:
    simulation = Simulation(num_blocks=20, block_size=4, max_model_len=40)
    simulation.add([0], 8, samples=3)  # its whole prompt is one token, as a decoding sequence computes it
    simulation.guess(0, 4)
    assert simulation.step().num_tokens == 1
    assert [own.num_output_tokens for own in simulation.live.values()] == [1, 1, 1]


def test_the_step_after_guesses_is_planned_when_it_is_known_which_were_right() -> None:
    simulation = Simulation(num_blocks=20, block_size=4, max_model_len=40, overlap=True)
    simulation.add([0, 1], 8)
    simulation.plan()
    simulation.commit()
    simulation.guess(0, 4)
    simulation.plan()
    assert simulation.try_plan() is None
    simulation.commit()
    assert simulation.try_plan() is not None
