from dataclasses import replace

import pytest

from benchmarks.engine import GUESSES, Load, added_by_guesses, load_of, measure, table


@pytest.mark.parametrize("overlap", [False, True])
def test_every_part_of_a_step_is_measured(overlap: bool) -> None:
    load = Load(running=4, prompt_length=16, output_length=16, overlap=overlap)
    budget = measure(load, steps=40)
    assert budget.load == load
    # All four run in nearly every step, though sequences end and others begin.
    assert 3 * 40 < budget.sequence_steps <= 4 * 40
    assert budget.tokens_per_step == 1
    parts = (budget.plan, budget.translate, budget.commit, budget.messages)
    assert min(*parts, budget.gpu_inputs) > 0
    assert budget.total == pytest.approx(sum(parts))


def test_a_step_with_guesses_is_measured() -> None:
    right = measure(Load(running=2, prompt_length=16, output_length=200, guesses="right"), steps=40)
    assert 2.5 < right.tokens_per_step <= 1 + GUESSES.max_guesses
    wrong = measure(Load(running=2, prompt_length=16, output_length=40, guesses="wrong"), steps=40)
    assert wrong.tokens_per_step < 1.1


def test_the_table_has_a_line_for_each_load() -> None:
    budget = replace(measure(Load(1, 8, 8), steps=10), plan=1.25, translate=1.0, commit=0.25)
    assert "| 1 | 1.25 | 1.00 | 0.25 | 2.50 |" in table([budget])
    without = replace(budget, load=load_of(1, "none", overlap=False))
    guessing = replace(budget, load=load_of(1, "right", overlap=False), plan=3.75, tokens_per_step=4.5)
    assert added_by_guesses([without, guessing]).endswith("| 1 | right | 2.50 | 4.50 |")
