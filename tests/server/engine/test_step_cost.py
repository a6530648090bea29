"""What steps cost is learned from steps, noise and outliers among them, and says how long a chunk may be."""

from math import inf
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persimmon.server.engine.step_cost import (
    ENOUGH,
    FIRST_CHUNK,
    QUIET_SHARE,
    LinearFit,
    StepCostModel,
    StepCosts,
    StepWork,
)

TRUE = StepCosts(
    step=4e-3, decode=1e-4, decode_context=2e-8, chunks=1e-3, chunk_token=5e-5, chunk_context=3e-9, chunk_reach=2e-7
)


def some_work(rng: Random, *, chunk: bool) -> StepWork:
    decodes = rng.randint(1, 64)
    tokens = rng.randint(1, 500) if chunk else 0
    start = rng.randint(0, 16_000) if chunk else 0
    return StepWork(
        decodes=decodes,
        decode_context=decodes * rng.randint(100, 4000),
        chunk_tokens=tokens,
        chunk_context=tokens * (start + tokens // 2),
        chunk_reach=start,
    )


def learn(steps: int, noise: float = 0.0, outliers: float = 0.0, seed: int = 0) -> StepCostModel:
    rng, model = Random(seed), StepCostModel()
    for number in range(steps):
        work = some_work(rng, chunk=number % 3 == 0)
        factor = rng.gauss(1, noise) * (20 if rng.random() < outliers else 1)
        model.observe(work, TRUE.seconds(work) * factor)
    return model


@pytest.mark.parametrize(("noise", "outliers", "tolerance"), [(0, 0, 0.01), (0.05, 0, 0.1), (0.05, 0.03, 0.25)])
def test_what_steps_cost_is_learned(noise: float, outliers: float, tolerance: float) -> None:
    costs = learn(900, noise, outliers).costs
    rng = Random(9)
    for number in range(50):
        work = some_work(rng, chunk=number % 2 == 0)
        assert costs.seconds(work) == pytest.approx(TRUE.seconds(work), rel=tolerance)


def test_time_does_not_count_before_steps_of_both_kinds_were_seen() -> None:
    model, rng = StepCostModel(), Random(0)
    for _ in range(50):
        work = some_work(rng, chunk=False)
        model.observe(work, TRUE.seconds(work))
    costs = model.costs
    assert costs.affordable(costs.chunk_seconds(9, 900, 1), 5) == inf


def test_chunks_beside_decodes_at_most_double_from_step_to_step() -> None:
    model = StepCostModel()
    for _ in range(ENOUGH):
        assert model.costs.chunk_tokens(decodes=8, prompts=1) == FIRST_CHUNK
        model.observe(StepWork(8, 800, 90), 1.0)
        model.observe(StepWork(8, 800), 0.5)
    assert model.costs.chunk_tokens(decodes=8, prompts=1) == FIRST_CHUNK
    assert model.costs.chunk_tokens(decodes=0, prompts=1) == inf
    assert model.costs.chunk_tokens(decodes=8, prompts=16) == 4 * FIRST_CHUNK
    model.observe(StepWork(8, 800, 200), 1.0)
    assert model.costs.chunk_tokens(decodes=8, prompts=1) == 400
    model.observe(StepWork(0, 0, 2000), 1.0)
    model.observe(StepWork(8, 800, 1), 1.0)
    assert model.costs.chunk_tokens(decodes=8, prompts=1) == 380


def test_what_chunks_cost_is_not_forgotten_while_nobody_sends_a_prompt() -> None:
    model, rng = learn(300), Random(1)
    for _ in range(5000):
        work = some_work(rng, chunk=False)
        model.observe(work, TRUE.seconds(work))
    costs = model.costs
    assert costs.chunk(400, 8000) == pytest.approx(TRUE.chunk(400, 8000), rel=0.05)


def test_a_machine_that_becomes_slower_is_noticed() -> None:
    model, rng = learn(300), Random(1)
    for number in range(900):
        work = some_work(rng, chunk=number % 3 == 0)
        model.observe(work, 3 * TRUE.seconds(work))
    costs = model.costs
    work = some_work(rng, chunk=True)
    assert costs.seconds(work) == pytest.approx(3 * TRUE.seconds(work), rel=0.1)


@given(seed=st.integers(0, 2**32), steps=st.integers(1, 40))
def test_no_part_of_a_step_ever_costs_less_than_nothing(seed: int, steps: int) -> None:
    rng, fit = Random(seed), LinearFit(3)
    for _ in range(steps):
        fit.observe((1.0, rng.choice([0.0, 1.0, 7.0]), rng.choice([0.0, 0.1, 3.0])), rng.choice([0.0, 1e-5, 1.0]))
        assert min(fit.coefficients) >= 0


@given(
    budget=st.floats(1e-4, 1.0),
    start=st.integers(0, 16_384),
    costs=st.builds(
        StepCosts, *[st.just(1e-3)] * 4, st.sampled_from([1e-6, 5e-5, 1e-3]), st.sampled_from([0.0, 1e-9, 1e-7])
    ),
)
def test_an_affordable_chunk_takes_just_the_time_there_is(budget: float, start: int, costs: StepCosts) -> None:
    tokens = costs.affordable(budget, start)
    assert costs.chunk(tokens, start) == pytest.approx(budget, rel=1e-6)


def test_chunks_have_all_the_time_while_nobody_decodes_and_a_share_of_it_while_somebody_does() -> None:
    assert TRUE.chunk_seconds(0, 0, 1) == inf
    assert TRUE.affordable(inf, 5) == inf
    quiet = TRUE.seconds(StepWork(32, 32_000))
    assert TRUE.chunk_seconds(32, 32_000, 1) == pytest.approx(QUIET_SHARE * quiet - TRUE.chunks)
    assert TRUE.chunk_seconds(32, 32_000, 8) == pytest.approx(2 * QUIET_SHARE * quiet - TRUE.chunks)
    assert TRUE.chunk_seconds(2, 32_000, 3) == pytest.approx(
        1.5 * QUIET_SHARE * TRUE.seconds(StepWork(2, 32_000)) - TRUE.chunks
    )
    assert TRUE.affordable(-1.0, 5) == 0


def test_a_longest_step_that_was_asked_for_holds() -> None:
    costs = StepCosts(step=4e-3, decode=0, decode_context=0, chunks=0, chunk_token=5e-5, chunk_context=0, longest=20e-3)
    assert costs.chunk_seconds(1, 10, 1) == pytest.approx(16e-3)


def test_what_chunks_cost_is_learned_though_decodes_were_thought_to_cost_more() -> None:
    model = StepCostModel()
    for _ in range(40):
        # Whether a step costs this or the sequence does cannot be seen.
        model.observe(StepWork(1, 50), TRUE.seconds(StepWork(1, 50)))
    work = StepWork(64, 6_400, chunk_tokens=400, chunk_context=80_000)
    for _ in range(20):
        model.observe(work, TRUE.seconds(work))
    for decodes in range(1, 65):
        model.observe(StepWork(decodes, 100 * decodes), TRUE.seconds(StepWork(decodes, 100 * decodes)))
    for _ in range(20):
        model.observe(work, TRUE.seconds(work))
    assert model.costs.seconds(work) == pytest.approx(TRUE.seconds(work), rel=0.1)
