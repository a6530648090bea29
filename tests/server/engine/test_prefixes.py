"""What sequences find in the prefix cache, and for which blocks they wait."""

import pytest

from persimmon.server.engine.messages import Pooling
from tests.server.engine.fake_model import STEMS
from tests.server.engine.simulation import Simulation


@pytest.mark.parametrize(("prompt_length", "start"), [(13, 12), (12, 8), (11, 8), (4, 0), (1, 0)])
def test_whole_prompt_cached_recomputes_the_last_token(prompt_length: int, start: int) -> None:
    simulation = Simulation(num_blocks=10, block_size=4, max_model_len=20)
    prompt = STEMS[0][:prompt_length]
    simulation.add(prompt, 4)
    simulation.drain()
    again = simulation.add(prompt, 4)
    (item,) = simulation.plan().scheduled
    assert (item.sequence, item.start, item.count) == (again, start, prompt_length - start)
    assert item.samples
    assert again.cached_tokens == start
    simulation.drain()


def test_prefix_hits_cost_no_budget() -> None:
    simulation = Simulation(num_blocks=20, block_size=4, max_model_len=20, max_num_seqs=4, max_num_batched_tokens=5)
    simulation.add(STEMS[0][:17], 1)
    simulation.drain()
    known, new = simulation.add(STEMS[0][:17], 1), simulation.add([2] * 4, 1)
    plan = simulation.plan()
    assert [(item.sequence, item.count, item.samples) for item in plan.scheduled] == [
        (known, 1, (known,)),
        (new, 4, (new,)),
    ]
    simulation.drain()


def test_generated_tokens_are_found_by_the_next_turn_of_a_conversation() -> None:
    simulation = Simulation(num_blocks=20, block_size=4, max_model_len=40)
    first = simulation.add(STEMS[0][:6], 11)
    simulation.drain()
    second = simulation.add([*first.token_ids, 0, 1], 2)
    simulation.step()
    # Of 17 tokens the last was sampled and never computed.
    assert second.cached_tokens == 16


def test_two_running_sequences_share_the_blocks_of_their_prefix() -> None:
    simulation = Simulation(num_blocks=20, block_size=4, max_model_len=40)
    simulation.add(STEMS[0][:9], 8)
    simulation.step()
    held = simulation.pool.num_blocks - simulation.pool.num_free
    simulation.add(STEMS[0][:9], 8)
    simulation.step()
    assert simulation.pool.num_blocks - simulation.pool.num_free == held + 1
    simulation.drain()


def test_a_prefix_that_arrives_several_times_at_once_is_computed_once() -> None:
    simulation = Simulation(num_blocks=40, block_size=4, max_model_len=40)
    twins = [simulation.add(STEMS[0][:9], 2) for _ in range(4)]
    plan = simulation.plan()
    assert [item.sequence for item in plan.scheduled] == twins[:1]
    late = simulation.add(STEMS[0][:9], 2)
    simulation.commit()
    plan = simulation.step()
    assert [item.count for item in plan.scheduled] == [1] * 5
    assert [sequence.cached_tokens for sequence in [*twins, late]] == [0, 8, 8, 8, 8]
    simulation.drain()


def test_who_shares_a_beginning_waits_for_that_and_no_longer() -> None:
    simulation = Simulation(num_blocks=60, block_size=4, max_model_len=60, max_num_batched_tokens=8)
    long, shares = simulation.add(STEMS[0], 1), simulation.add([*STEMS[0][:6], 2, 2, 2, 2], 1)
    assert [item.sequence for item in simulation.step().scheduled] == [long]
    assert shares in [item.sequence for item in simulation.step().scheduled] or shares.block_table == []
    simulation.step_until(lambda: shares.cached_tokens is not None)
    assert shares.cached_tokens == 4
    assert long.num_computed < long.prompt_length or long.finished
    simulation.drain()


@pytest.mark.parametrize("steps", [0, 1])
def test_who_waits_for_a_prefix_computes_it_when_its_owner_is_gone(steps: int) -> None:
    simulation = Simulation(num_blocks=60, block_size=4, max_model_len=60, max_num_batched_tokens=8)
    simulation.add(STEMS[0][:21], 1)
    follows = simulation.add(STEMS[0][:21], 1)
    simulation.step()
    for _ in range(steps):
        simulation.step()
    assert follows.block_table == []
    simulation.abort(0)
    plan = simulation.step()
    assert [item.sequence for item in plan.scheduled] == [follows]
    assert follows.cached_tokens == 8 * (1 + steps)
    simulation.drain()


def test_an_owner_whose_place_a_fork_takes_leaves_its_prefix_to_it() -> None:
    simulation = Simulation(num_blocks=60, block_size=4, max_model_len=60, max_num_batched_tokens=8)
    simulation.add(STEMS[0][:21], 1, samples=2)
    follows = simulation.add(STEMS[0][:21], 1)
    simulation.step()
    simulation.abort(0)
    simulation.step()
    assert follows.block_table == []
    simulation.drain()
    assert follows.cached_tokens == 20


def test_without_prefix_caching_everything_is_computed() -> None:
    simulation = Simulation(num_blocks=20, block_size=4, max_model_len=40, prefix_caching=False)
    for _ in range(2):
        sequence = simulation.add(STEMS[0][:9], 2)
        simulation.drain()
        assert sequence.cached_tokens == 0
    assert simulation.stats.cached_tokens == 0


def test_cached_tokens_are_those_of_the_first_admission() -> None:
    simulation = Simulation(num_blocks=7, block_size=2, max_model_len=14)
    _, victim = simulation.add([0, 1, 2, 0], 10), simulation.add([0, 1, 2, 0], 10)
    simulation.step_until(lambda: simulation.stats.preemptions == 1)
    simulation.drain()
    assert simulation.stats.cached_tokens > 2, "it came back on the blocks of its twin"
    assert victim.cached_tokens == 2


@pytest.mark.parametrize(("pooling", "computed"), [(None, 2), ("last", 2), ("all", 10), ("sum", 10)])
def test_prompt_tokens_whose_states_are_reported_are_computed_though_they_are_cached(
    pooling: Pooling | None, computed: int
) -> None:
    simulation = Simulation(num_blocks=20, block_size=4, max_model_len=40)
    simulation.add(STEMS[0][:10], 1)
    simulation.drain()
    simulation.add(STEMS[0][:10], 1, pooling=pooling)
    assert simulation.plan().num_tokens == computed
