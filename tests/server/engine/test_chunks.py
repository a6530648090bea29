"""How much of which prompts a step computes."""

from dataclasses import replace

import pytest

from persimmon.server.engine.chunks import MIN_CHUNK
from persimmon.server.engine.step_cost import StepCosts
from tests.server.engine.fake_model import STEMS
from tests.server.engine.simulation import Simulation


def test_a_long_prompt_never_delays_a_running_decode() -> None:
    simulation = Simulation(num_blocks=40, block_size=4, max_model_len=100, max_num_seqs=2, max_num_batched_tokens=8)
    short = simulation.add([1], 20)
    simulation.step()
    long = simulation.add([2] * 60, 3)
    while long.num_output_tokens == 0:
        before = short.num_output_tokens
        plan = simulation.step()
        assert plan.scheduled[0].sequence is short
        assert short.num_output_tokens == before + 1
        assert plan.num_tokens == 8 or long.num_output_tokens == 1, "the rest of the budget is the prompt's"
    assert short.num_output_tokens == 1 + 9  # 60 tokens in chunks of 7


def test_half_of_a_step_is_for_the_first_prompt_and_the_rest_for_the_shortest() -> None:
    simulation = Simulation(num_blocks=60, block_size=4, max_model_len=100, max_num_seqs=4, max_num_batched_tokens=8)
    long, longer = simulation.add([2] * 40, 2), simulation.add([1] * 60, 2)
    short = simulation.add([0] * 6, 2)
    counts = [{item.sequence: item.count for item in simulation.step().scheduled} for _ in range(2)]
    assert counts == [{long: 4, short: 4}, {long: 4, short: 2, longer: 2}]
    assert short.num_output_tokens == 1
    simulation.drain()


def test_a_long_prompt_gets_what_short_ones_leave() -> None:
    simulation = Simulation(num_blocks=60, block_size=4, max_model_len=100, max_num_seqs=4, max_num_batched_tokens=8)
    long, short = simulation.add([2] * 40, 2), simulation.add([0], 2)
    plan = simulation.step()
    assert {item.sequence: item.count for item in plan.scheduled} == {long: 7, short: 1}
    simulation.drain()


class TestTime:
    """What chunks take is known: a step takes 1 s, and so does each token of a chunk."""

    COSTS = StepCosts(1.0, decode=0.0, decode_context=0.0, chunks=0.0, chunk_token=1.0, chunk_context=0.0, longest=21)

    def simulation(self) -> Simulation:
        simulation = Simulation(num_blocks=90, block_size=4, max_model_len=200, max_num_batched_tokens=64)
        simulation.costs = self.COSTS
        return simulation

    def test_bounds_chunks_beside_those_who_decode(self) -> None:
        simulation = self.simulation()
        simulation.add([1], 30)
        simulation.step()
        long = simulation.add([2] * 40, 2)
        while long.num_output_tokens == 0:
            assert simulation.step().work.chunk_tokens == 20

    def test_does_not_matter_while_nobody_decodes(self) -> None:
        simulation = self.simulation()
        simulation.add([2] * 64, 2)
        assert simulation.step().work.chunk_tokens == 64

    def test_matters_less_the_more_prompts_are_being_computed(self) -> None:
        simulation = self.simulation()
        simulation.add([1], 30)
        simulation.step()
        for token in range(3):
            simulation.add([token] * 30, 2)
        assert simulation.step().work.chunk_tokens == 3 * 20

    def test_matters_as_much_while_others_wait_for_a_place(self) -> None:
        simulation = Simulation(num_blocks=90, block_size=4, max_model_len=200, max_num_seqs=2)
        simulation.costs = self.COSTS
        simulation.add([1], 30)
        simulation.step()
        for token in range(3):
            simulation.add([token] * 30, 2)
        assert simulation.step().work.chunk_tokens == 20
        assert len(simulation.waiting) == 2
        simulation.drain()

    def test_lets_the_first_and_the_shortest_prompt_advance_though_there_is_none(self) -> None:
        simulation = self.simulation()
        simulation.costs = replace(self.COSTS, longest=0.5)
        running = simulation.add([1], 60)
        simulation.step()
        long, short = simulation.add([2] * 90, 2), simulation.add([0] * 20, 2)
        longer = simulation.add([1] * 99, 2)
        plan = simulation.step()
        assert {item.sequence: item.count for item in plan.scheduled} == {
            running: 1,
            long: MIN_CHUNK,
            short: MIN_CHUNK,
        }
        simulation.step()
        assert longer.num_computed == 0
        assert not short.finished
        simulation.step_until(lambda: longer.num_computed > 0)
        assert long.num_computed < 90
        simulation.drain()

    def test_of_long_contexts_counts(self) -> None:
        simulation = self.simulation()
        simulation.costs = replace(self.COSTS, chunk_context=0.1, longest=100)
        simulation.add([1], 30)
        simulation.step()
        simulation.add([2] * 60, 2)
        # n tokens after s others take n + n * (s + n / 2) / 10 seconds of 99.
        assert [simulation.step().work.chunk_tokens for _ in range(2)] == [35, 18]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_chunks_of_any_size_yield_the_same_tokens(chunk: int) -> None:
    simulation = Simulation(num_blocks=20, block_size=4, max_model_len=40, max_num_seqs=1, max_num_batched_tokens=chunk)
    sequence = simulation.add(STEMS[1][:23], 4)
    counts = []
    while sequence.num_output_tokens == 0:
        counts.append(simulation.step().num_tokens)
    assert counts == [chunk] * (23 // chunk) + [23 % chunk] * (23 % chunk > 0)
    simulation.drain()
