"""Which sequences hold blocks: which begin, which are preempted, what an abort leaves, and where samples begin."""

import pytest

from persimmon.server.engine.blocks import BlockPool
from persimmon.server.engine.scheduler import Scheduler
from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.step_plan import Advance
from tests.server.engine.fake_model import STEMS, generate_alone
from tests.server.engine.simulation import Simulation


def test_no_more_than_max_num_seqs_run_and_the_next_in_line_follows() -> None:
    simulation = Simulation(num_blocks=40, block_size=4, max_model_len=20, max_num_seqs=2)
    first, second, third = (simulation.add([i], 2 + i) for i in range(3))
    simulation.step()
    assert simulation.running == [first, second]
    simulation.step()
    assert first.finished
    simulation.step()
    assert simulation.running == [third]
    assert second.finished


def test_a_sequence_that_does_not_fit_is_not_overtaken() -> None:
    simulation = Simulation(num_blocks=6, block_size=4, max_model_len=24, prefix_caching=False)
    first = simulation.add([0] * 9, 3)
    large, small = simulation.add([1] * 20, 2), simulation.add([2], 1)
    simulation.step()
    assert simulation.running == [first]
    assert simulation.waiting == [large, small]
    simulation.drain()


def test_who_has_computed_least_is_preempted_first() -> None:
    simulation = Simulation(num_blocks=12, block_size=2, max_model_len=24, prefix_caching=False)
    oldest, small, large = simulation.add([0] * 2, 20), simulation.add([1] * 2, 20), simulation.add([2] * 10, 12)
    simulation.step_until(lambda: simulation.stats.preemptions == 1)
    assert simulation.running == [oldest, large]
    assert simulation.stats.recomputed_tokens < 10
    simulation.drain()
    assert small.finished


def test_of_equals_the_newest_sequence_is_preempted_first() -> None:
    simulation = Simulation(num_blocks=9, block_size=2, max_model_len=18, prefix_caching=False)
    oldest, middle, newest = (simulation.add([i] * 2, 12) for i in range(3))
    simulation.step()
    assert simulation.running == [oldest, middle, newest]
    simulation.step_until(lambda: simulation.stats.preemptions == 1)
    assert simulation.running == [oldest, middle]
    assert newest.num_computed == 0
    simulation.step_until(lambda: simulation.stats.preemptions == 2)
    assert simulation.running == [oldest]
    assert simulation.waiting == [middle, newest]
    simulation.drain()
    assert list(simulation.finished.values()) == [oldest, middle, newest]


def test_a_lower_priority_goes_first_and_is_preempted_last() -> None:
    simulation = Simulation(num_blocks=12, block_size=4, max_model_len=48, max_num_seqs=3, max_num_batched_tokens=40)
    oldest, plain, later, urgent = (
        simulation.add(prompt, 12, priority=priority)
        for prompt, priority in (([0] * 9, 1), ([1] * 9, 1), ([1, 2] * 4, 1), ([2] * 9, 0))
    )
    simulation.step_until(lambda: len(simulation.running) == 3)
    assert simulation.running == [urgent, oldest, plain]
    simulation.step_until(lambda: simulation.stats.preemptions > 0)
    assert simulation.running == [urgent, oldest]
    simulation.drain()
    assert later.finished


def test_the_oldest_is_not_preempted_for_more_urgent_ones() -> None:
    simulation = Simulation(num_blocks=8, block_size=4, max_model_len=32, max_num_seqs=2, max_num_batched_tokens=40)
    oldest = simulation.add([0] * 9, 12, priority=1)
    simulation.step()
    arrivals = 1
    while not oldest.finished:
        assert simulation.scheduler.stats().steps <= 14
        simulation.add([2] * 9, 12, priority=0)
        arrivals += 1
        simulation.step()
    assert simulation.stats.preemptions > 0
    simulation.drain()


def test_a_preempted_sequence_comes_back_before_those_that_wait() -> None:
    simulation = Simulation(num_blocks=6, block_size=2, max_model_len=12, max_num_seqs=2, prefix_caching=False)
    oldest, victim, later = (simulation.add([i] * 2, 9) for i in range(3))
    simulation.step_until(lambda: simulation.stats.preemptions == 1)
    assert simulation.waiting == [victim, later]
    simulation.step_until(lambda: oldest.finished)
    simulation.step()
    assert simulation.running[0] is victim


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preempted_sequence_yields_the_same_tokens(prefix_caching: bool) -> None:
    simulation = Simulation(num_blocks=7, block_size=2, max_model_len=14, prefix_caching=prefix_caching)
    simulation.add([0, 1], 12)
    victim = simulation.add([2, 1], 12)
    simulation.step_until(lambda: simulation.stats.preemptions == 1)
    assert 0 < victim.num_output_tokens < 12
    assert simulation.waiting == [victim]
    simulation.drain()
    assert victim.token_ids == [2, 1, *generate_alone([2, 1], 12)[0]]


def test_a_sequence_preempted_while_its_prompt_is_computed_yields_the_same_tokens() -> None:
    simulation = Simulation(num_blocks=13, block_size=2, max_model_len=20, max_num_seqs=2, max_num_batched_tokens=2)
    simulation.add([0], 19)
    simulation.step()
    victim = simulation.add([1] * 17, 2)
    simulation.step_until(lambda: simulation.stats.preemptions == 1)
    assert victim.num_output_tokens == 0
    assert simulation.stats.recomputed_tokens > 0
    simulation.drain()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("max_num_batched_tokens", [8, 13, 500])
def test_thirty_percent_of_the_blocks_needed_change_no_token(
    prefix_caching: bool, max_num_batched_tokens: int, overlap: bool
) -> None:
    block_size, prompt_length, max_tokens = 4, 12, 28
    needed = 8 * -(-(prompt_length + max_tokens) // block_size)
    simulation = Simulation(
        num_blocks=needed * 3 // 10,
        block_size=block_size,
        max_model_len=prompt_length + max_tokens,
        max_num_batched_tokens=max_num_batched_tokens,
        prefix_caching=prefix_caching,
        overlap=overlap,
    )
    sequences = [simulation.add(([i, *STEMS[i % 2]] * 2)[:prompt_length], max_tokens) for i in (0, 1, 2, 0) * 2]
    simulation.drain()
    assert simulation.stats.preemptions > 0
    for sequence in sequences:
        prompt = sequence.token_ids[:prompt_length]
        assert sequence.token_ids[prompt_length:] == generate_alone(prompt, max_tokens)[0]


def test_abort_between_plan_and_commit_frees_blocks_when_the_step_has_ended() -> None:
    simulation = Simulation(num_blocks=20, block_size=4, max_model_len=40)
    gone, stays = simulation.add([0] * 9, 8), simulation.add([1] * 9, 8)
    simulation.plan()
    free = simulation.pool.num_free
    simulation.abort(0)
    assert simulation.pool.num_free == free, "the step may still write them"
    assert [advance.sequence for advance in simulation.commit()] == [stays]
    assert simulation.pool.num_free == free + 3
    assert gone.num_output_tokens == 0
    # What the step computed for it is not findable: its blocks may belong to another sequence by now.
    third = simulation.add([0] * 9, 1)
    simulation.step()
    assert third.cached_tokens == 0


def test_aborted_sequences_let_those_behind_them_in() -> None:
    simulation = Simulation(num_blocks=20, block_size=4, max_model_len=40, max_num_seqs=1)
    for i in range(3):
        simulation.add([i], 8)
    simulation.step()
    simulation.abort(1)
    simulation.abort(0)
    simulation.step()
    assert list(simulation.live) == [2]
    assert simulation.stats.running == 1


def test_unknown_and_finished_sequences_can_be_aborted() -> None:
    simulation = Simulation(num_blocks=20, block_size=4, max_model_len=40)
    simulation.add([1], 1)
    simulation.drain()
    simulation.abort(0)
    simulation.abort(99)
    assert simulation.finished[0].finish_reason == "length"


def test_a_key_can_be_used_again_once_its_sequence_has_ended() -> None:
    scheduler = Scheduler(BlockPool(4, 4), max_num_seqs=1, max_num_batched_tokens=4, max_model_len=16)
    old = Sequence("a", [1], 8)
    scheduler.add(old)
    plan = scheduler.plan()
    scheduler.abort("a")
    new = Sequence("a", [2], 8)
    scheduler.add(new)
    assert scheduler.commit(plan, [[7]]) == [], "the token was the old one's"
    assert new.token_ids == [2]
    assert scheduler.commit(scheduler.plan(), [[7]]) == [Advance(new, [7], 0)]


def test_samples_of_a_prompt_compute_it_once_and_share_its_blocks() -> None:
    simulation = Simulation(num_blocks=40, block_size=4, max_model_len=40, prefix_caching=False)
    leader = simulation.add(STEMS[0][:14], 9, samples=4)
    plan = simulation.step()
    assert [(item.count, len(item.samples)) for item in plan.scheduled] == [(14, 4)]
    shared = list(leader.block_table)
    assert [sequence.block_table for sequence in simulation.live.values()] == [shared] * 4
    # Each but the last to write into it copies the block that the prompt fills in part.
    plan = simulation.step()
    assert [source for source, _ in plan.copies] == [shared[-1]] * 3
    tables = [sequence.block_table for sequence in simulation.live.values()]
    assert all(table[:3] == shared[:3] for table in tables)
    assert len({table[3] for table in tables}) == 4
    simulation.drain()
    assert simulation.stats.prompt_tokens == 14


def test_a_prompt_that_fills_its_blocks_is_not_copied() -> None:
    simulation = Simulation(num_blocks=40, block_size=4, max_model_len=40)
    simulation.add(STEMS[0][:12], 3, samples=3)
    simulation.step()
    assert simulation.step().copies == []
    simulation.drain()


def test_samples_that_there_is_no_room_for_follow_when_others_have_finished() -> None:
    simulation = Simulation(num_blocks=60, block_size=4, max_model_len=40, max_num_seqs=3)
    simulation.add(STEMS[0][:13], 5, samples=7)
    later = simulation.add(STEMS[1][:5], 2)
    simulation.step()
    assert (simulation.stats.running, simulation.stats.waiting) == (3, 5)
    simulation.step_until(lambda: 5 in simulation.finished)
    assert later.num_output_tokens == 0, "it arrived after all of them"
    simulation.drain()
    # Those that followed found the prompt's full blocks.
    assert simulation.stats.cached_tokens >= 12


@pytest.mark.parametrize("wait", [0, 1, 2])
def test_the_samples_of_an_aborted_one_go_on(wait: int) -> None:
    """Aborted before its prompt is begun, half through it, and after it."""
    simulation = Simulation(num_blocks=60, block_size=4, max_model_len=40, max_num_batched_tokens=8)
    simulation.add(STEMS[0][:13], 5, samples=3)
    for _ in range(wait):
        simulation.step()
    simulation.abort(0)
    simulation.drain()
    assert sorted(simulation.finished) == [1, 2]
    assert simulation.stats.steps == 6, "nothing of the prompt was computed twice"
