"""What benchmarks.guess_limits counts, on texts short enough to count by hand."""

import random

import pytest

from benchmarks.guess_limits import WAYS, hindsight, steps


def test_no_step_is_saved_where_nothing_repeats() -> None:
    prompt, answer = [1, 2, 3], [4, 5, 6, 7]
    for name, make in WAYS.items():
        assert steps(make(prompt, answer), prompt, answer) == 4, name


def test_a_quoted_prompt_takes_one_step_after_the_token_that_shows_it() -> None:
    prompt, answer = list(range(100, 120)), list(range(105, 115))
    # The first token, then nine guessed at once; no guess can come before there is a token that occurred.
    assert steps(hindsight(prompt, answer), prompt, answer) == 2
    assert steps(WAYS["auto"](prompt, answer), prompt, answer) == 2
    # Five guesses a step, of which the first needs two tokens that occurred.
    assert steps(WAYS["ngram"](prompt, answer), prompt, answer) == 4


def test_hindsight_takes_the_occurrence_that_goes_right_for_longest() -> None:
    prompt = [1, 2, 9, 9, 1, 3, 4, 5, 9]
    assert list(hindsight(prompt, [1, 3, 4, 5, 6])([*prompt, 1])) == [3, 4, 5]


def test_a_run_of_one_token_is_guessed_past_the_tokens_known() -> None:
    prompt, answer = [1], [1] * 20
    assert steps(hindsight(prompt, answer), prompt, answer) == 2


@pytest.mark.parametrize("seed", range(20))
def test_nothing_takes_fewer_steps_than_hindsight(seed: int) -> None:
    numbers = random.Random(seed)
    prompt, answer = numbers.choices(range(4), k=40), numbers.choices(range(4), k=60)
    least = steps(hindsight(prompt, answer), prompt, answer)
    for name, make in WAYS.items():
        assert steps(make(prompt, answer), prompt, answer) >= least, name
