"""The scheduler: whatever arrives, in any order, every sequence gets the tokens that it would get alone."""

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from persimmon.server.engine.blocks import BlockPool
from persimmon.server.engine.chunks import MIN_CHUNK
from persimmon.server.engine.messages import Pooling
from persimmon.server.engine.scheduler import Scheduler
from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.step_cost import GuessCosts, StepCosts
from persimmon.server.engine.step_plan import Advance
from tests.server.engine.fake_model import VOCABULARY, generate_alone
from tests.server.engine.simulation import Simulation

STEMS = [[0, 1, 2, 0, 2, 1] * 5, [2, 2, 1, 0, 0, 1] * 5]
"""What prompts begin with, so that they meet in the prefix cache."""


CLIENTS = (("", 1), ("", 1), ("other", 1), ("heavy", 3))
"""Clients and the weights of their shares."""

Request = tuple[list[int], int, frozenset[int], int, Pooling | None, int, bool, tuple[str, int]]


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """What a client may ask for; long answers are the ones that fill the pool."""
    stem = draw(st.sampled_from(STEMS))[: draw(st.sampled_from([4, 0, 9, 20]))]
    prompt = stem + draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=3))
    stops = draw(st.sampled_from([frozenset(), frozenset(), frozenset({0})]))
    samples = draw(st.sampled_from([1, 1, 1, 2, 3, 7]))
    pooling: Pooling | None = draw(st.sampled_from([None, None, None, "all", "last"]))
    priority = draw(st.sampled_from([0, 0, 0, -1, 5]))
    penalized = draw(st.sampled_from([False, False, False, True]))
    client = draw(st.sampled_from(CLIENTS))
    return prompt, draw(st.sampled_from([20, 7, 2, 1, 0])), stops, samples, pooling, priority, penalized, client


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, steps and aborts in any order; `Simulation` checks after each of them."""

    @initialize(
        block_size=st.sampled_from([2, 1, 3, 4]),
        max_model_len=st.sampled_from([24, 16, 9]),
        spare_blocks=st.sampled_from([5, 1, 0]),
        max_num_seqs=st.sampled_from([5, 3, 2]),
        spare_budget=st.sampled_from([12, 5, 1, 0]),
        prefix_caching=st.sampled_from([True, True, False]),
        overlap=st.booleans(),
        typical_output=st.sampled_from([1, 16]),
        guessing=st.sampled_from([(0, 0, False), (0, 0, False), (3, 1, False), (7, 5, False), (7, 3, True)]),
        max_guess_rows=st.sampled_from([None, None, 6]),
        costs=st.sampled_from(
            [
                None,
                None,
                StepCosts(
                    step=1,
                    decode=0.1,
                    decode_context=0,
                    chunks=0.1,
                    chunk_token=0.3,
                    chunk_context=0.01,
                    guesses=GuessCosts(step=1, decode=0.1, decode_context=0, observed=True, token=0.2),
                ),
                StepCosts(step=1, decode=0, decode_context=0, chunks=1, chunk_token=1, chunk_context=0),
            ]
        ),
        arrivals=st.lists(requests(), min_size=2, max_size=6),
    )
    def create(
        self,
        block_size: int,
        max_model_len: int,
        spare_blocks: int,
        max_num_seqs: int,
        spare_budget: int,
        prefix_caching: bool,
        overlap: bool,
        typical_output: int,
        guessing: tuple[int, int, bool],
        max_guess_rows: int | None,
        costs: StepCosts | None,
        arrivals: list[Request],
    ) -> None:
        self.simulation = Simulation(
            num_blocks=-(-max_model_len // block_size) + spare_blocks,
            block_size=block_size,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + spare_budget,
            prefix_caching=prefix_caching,
            overlap=overlap,
            typical_output=typical_output,
            max_guesses=guessing[0],
            right_in_a_row=guessing[1],
            adaptive=guessing[2],
            max_guess_rows=max_guess_rows,
        )
        self.simulation.costs = costs
        # Hypothesis leaves rules out of many runs to explore the others; without sequences there is nothing to see.
        self.add(arrivals)

    @rule(arrivals=st.lists(requests(), min_size=1, max_size=4))
    def arrive(self, arrivals: list[Request]) -> None:
        self.add(arrivals)

    def add(self, arrivals: list[Request]) -> None:
        for prompt, max_tokens, stops, samples, pooling, priority, penalized, (owner, weight) in arrivals:
            fitting = prompt[: self.simulation.max_model_len - 1]
            tokens = min(max_tokens, self.simulation.max_model_len - len(fitting))
            samples = samples if tokens else 1
            self.simulation.add(
                fitting, tokens, stops, samples=samples, pooling=pooling, priority=priority, penalized=penalized,
                owner=owner, weight=weight,
            )  # fmt: skip

    @precondition(lambda self: self.simulation.can_plan)
    @rule()
    def plan(self) -> None:
        self.simulation.try_plan()

    @precondition(lambda self: self.simulation.under_way)
    @rule()
    def commit(self) -> None:
        self.simulation.commit()

    @precondition(lambda self: self.simulation.under_way)
    @rule()
    def fail(self) -> None:
        self.simulation.fail()

    @rule(count=st.integers(1, 15))
    def steps(self, count: int) -> None:
        while not self.simulation.can_plan:
            self.simulation.commit()
        for _ in range(count):
            self.simulation.step()

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """One that lives, has finished, was aborted before or never existed."""
        self.simulation.abort(data.draw(st.integers(-1, self.simulation.arrivals)))

    @precondition(lambda self: self.simulation.live)
    @rule(data=st.data(), count=st.integers(1, 9), right=st.integers(0, 9))
    def guess(self, data: st.DataObject, count: int, right: int) -> None:
        """What some get next is guessed: only the first tokens of it are right, or all."""
        for key in data.draw(st.sets(st.sampled_from(sorted(self.simulation.live)), min_size=1)):
            self.simulation.guess(key, count, wrong_at=right)

    @precondition(lambda self: self.simulation.live)
    @rule(data=st.data())
    def add_what_is_refused(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.simulation.live)))
        with pytest.raises(ValueError, match="exists already"):
            self.simulation.scheduler.add(Sequence(key, [0], 1))
        with pytest.raises(ValueError, match="exceed the maximum length of a sequence"):
            self.simulation.scheduler.add(Sequence("new", [0], self.simulation.max_model_len))

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.drain()
            stats = self.simulation.stats
            event(f"preemptions: {min(stats.preemptions, 3)}")
            event(f"prefix hits: {stats.cached_tokens > 0}")
            event(f"right guesses: {min(stats.accepted_tokens, 3)}")
            event(f"wrong guesses: {min(stats.draft_tokens - stats.accepted_tokens, 3)}")
            for state in self.simulation.aborts:
                event(f"aborted: {state}")


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    deadline=None, max_examples=250, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_preempts_hits_aborts_and_still_yields_the_right_tokens(seed: int, overlap: bool) -> None:
    rng = random.Random(seed)
    simulation = Simulation(
        num_blocks=14,
        block_size=3,
        max_model_len=36,
        max_num_seqs=6,
        max_num_batched_tokens=10,
        overlap=overlap,
        max_guesses=seed % 2 * 4,
        right_in_a_row=2,
    )

    def abort_sometimes() -> None:
        if simulation.live and rng.random() < 0.12:
            simulation.abort(rng.choice(list(simulation.live)))

    for _ in range(300):
        if rng.random() < 0.25:
            stem = rng.choice(STEMS)[: rng.randrange(20)]
            prompt = [*stem, rng.randrange(VOCABULARY)]
            stops = {rng.randrange(VOCABULARY)} if rng.random() < 0.2 else set()
            samples, priority = rng.choice([1, 1, 1, 2, 4]), rng.choice([0, 0, 0, 1])
            owner = rng.choice(["", "", "other"])
            tokens = rng.randint(1, 36 - len(prompt))
            simulation.add(prompt, tokens, stops, samples=samples, priority=priority, owner=owner)
        abort_sometimes()
        if simulation.can_plan:
            simulation.try_plan()
        abort_sometimes()
        if simulation.under_way and (not simulation.can_plan or rng.random() < 0.3):
            simulation.commit()
    simulation.drain()

    assert simulation.stats.preemptions > 3
    assert simulation.stats.cached_tokens > 100
    assert {"queued", "in a step"} <= set(simulation.aborts)
    assert overlap or "running" in simulation.aborts
    assert {sequence.finish_reason for sequence in simulation.finished.values()} == {"stop", "length"}


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


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_chunks_of_any_size_yield_the_same_tokens(chunk: int) -> None:
    simulation = Simulation(num_blocks=20, block_size=4, max_model_len=40, max_num_seqs=1, max_num_batched_tokens=chunk)
    sequence = simulation.add(STEMS[1][:23], 4)
    counts = []
    while sequence.num_output_tokens == 0:
        counts.append(simulation.step().num_tokens)
    assert counts == [chunk] * (23 // chunk) + [23 % chunk] * (23 % chunk > 0)
    simulation.drain()


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


class TestOverlap:
    """A step is planned while the one before it runs, and the tokens of that one are not known yet."""

    @staticmethod
    def simulation(num_blocks: int = 40) -> Simulation:
        return Simulation(num_blocks=num_blocks, block_size=4, max_model_len=40, overlap=True)

    def test_a_sequence_goes_on_from_a_token_that_is_being_sampled(self) -> None:
        simulation = self.simulation()
        first, second = simulation.add([0, 1], 5), simulation.add([2, 2], 5)
        simulation.plan()
        plan = simulation.plan()
        assert [(item.sequence, item.start, item.pending_row) for item in plan.scheduled] == [
            (first, 2, 0),
            (second, 2, 1),
        ]
        simulation.drain()

    def test_the_last_token_that_the_limit_allows_is_known_ahead(self) -> None:
        simulation = self.simulation()
        simulation.add([0, 1], 3)
        for _ in range(3):
            assert simulation.step().num_tokens > 0
        assert simulation.step().num_tokens == 0, "the third token ends it"
        assert simulation.stats.steps == 3

    def test_a_stop_drops_the_one_token_after_it_and_its_blocks_are_free_a_step_later(self) -> None:
        simulation = self.simulation()
        answer, _ = generate_alone([0, 1], 30)
        sequence = simulation.add([0, 1], 30, [answer[0]])
        simulation.plan()
        simulation.plan()
        simulation.commit()
        assert sequence.finish_reason == "stop"
        assert simulation.pool.num_free < simulation.pool.num_blocks
        assert simulation.commit() == []
        assert simulation.pool.num_free == simulation.pool.num_blocks
        assert sequence.token_ids == [0, 1, answer[0]]
        assert simulation.stats.generated_tokens == 1

    def test_a_draw_that_depends_on_the_token_before_waits_for_it(self) -> None:
        simulation = self.simulation()
        simulation.add([0, 1], 9)
        penalized = simulation.add([2, 2], 2, penalized=True)
        simulation.plan()
        assert simulation.try_plan() is None
        simulation.commit()
        simulation.step()
        simulation.step()
        assert penalized.finished
        assert simulation.try_plan() is not None, "steps overlap again when no other sequence depends on it"
        simulation.drain()

    def test_nobody_is_preempted_while_a_step_may_write_their_blocks(self) -> None:
        simulation = self.simulation(num_blocks=10)
        for token in range(3):
            simulation.add([token] * 4, 30)
        simulation.plan()
        while (plan := simulation.try_plan()) is not None:
            assert plan.scheduled
            assert simulation.stats.preemptions == 0
            simulation.commit()
        simulation.commit()
        simulation.plan()
        assert simulation.stats.preemptions > 0
        simulation.drain()

    def test_a_failed_step_ends_its_sequences_and_the_step_after_it_goes_on_for_the_others(self) -> None:
        simulation = self.simulation()
        failed = simulation.add([0, 1], 5)
        simulation.plan()
        newcomer = simulation.add([2, 2], 5)
        simulation.plan()
        simulation.fail()
        assert (failed.finish_reason, newcomer.finish_reason) == ("abort", None)
        assert [advance.sequence for advance in simulation.commit()] == [newcomer]
        simulation.drain()
        assert list(simulation.finished.values()) == [newcomer]

    def test_a_plan_that_does_not_know_of_the_step_under_way_is_refused(self) -> None:
        simulation = self.simulation()
        simulation.add([0, 1], 5)
        simulation.plan()
        with pytest.raises(ValueError, match="a step is running"):
            simulation.scheduler.plan()


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


def test_a_sequence_without_new_tokens_ends_with_its_prompt() -> None:
    simulation = Simulation(num_blocks=20, block_size=4, max_model_len=40, max_num_batched_tokens=8)
    only_prompt = simulation.add(STEMS[0][:13], 0, pooling="all")
    simulation.step()
    assert not only_prompt.finished
    simulation.step()
    assert only_prompt.finish_reason == "length"
    assert only_prompt.num_output_tokens == 0
    assert simulation.pool.num_free == 20


@pytest.mark.parametrize(("pooling", "computed"), [(None, 2), ("last", 2), ("all", 10), ("sum", 10)])
def test_prompt_tokens_whose_states_are_reported_are_computed_though_they_are_cached(
    pooling: Pooling | None, computed: int
) -> None:
    simulation = Simulation(num_blocks=20, block_size=4, max_model_len=40)
    simulation.add(STEMS[0][:10], 1)
    simulation.drain()
    simulation.add(STEMS[0][:10], 1, pooling=pooling)
    assert simulation.plan().num_tokens == computed


def test_stats_add_up() -> None:
    simulation = Simulation(num_blocks=8, block_size=4, max_model_len=32)
    simulation.add(STEMS[0][:9], 3)
    simulation.drain()
    simulation.add(STEMS[0][:9], 3)
    simulation.add([2, 2], 9)
    simulation.step()
    stats = simulation.stats
    assert (stats.running, stats.waiting, stats.total_blocks, stats.free_blocks) == (2, 0, 8, 4)
    assert (stats.steps, stats.prompt_tokens, stats.generated_tokens) == (4, 20, 5)
    assert (stats.queried_tokens, stats.cached_tokens) == (20, 8)
    assert (stats.preemptions, stats.recomputed_tokens) == (0, 0)


def test_an_idle_scheduler_plans_nothing() -> None:
    scheduler = Scheduler(BlockPool(4, 4), max_num_seqs=1, max_num_batched_tokens=4, max_model_len=16)
    assert not scheduler.has_work
    assert scheduler.plan().scheduled == []


def test_a_budget_below_one_token_per_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens is 7, fewer than max_num_seqs, which is 8"):
        Scheduler(BlockPool(8, 4), max_num_seqs=8, max_num_batched_tokens=7, max_model_len=16)


def test_a_pool_too_small_for_one_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="one sequence of 17 tokens needs 5 blocks, the pool has 4"):
        Scheduler(BlockPool(4, 4), max_num_seqs=1, max_num_batched_tokens=4, max_model_len=17)


def test_one_sequence_can_fill_the_whole_pool() -> None:
    simulation = Simulation(num_blocks=4, block_size=4, max_model_len=16, max_num_seqs=2)
    for i in range(3):
        simulation.add([i], 15)
    simulation.drain()


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 4, "0 prompt tokens and 4 new ones"),
        ([1], -1, "1 prompt tokens and -1 new ones"),
        ([1] * 10, 7, "10 prompt tokens and 7 new ones exceed the maximum length of a sequence, 16"),
        ([1] * 17, 1, "17 prompt tokens and 1 new ones exceed the maximum length of a sequence, 16"),
    ],
)
def test_a_sequence_that_could_never_run_is_refused(prompt: list[int], max_tokens: int, message: str) -> None:
    scheduler = Scheduler(BlockPool(4, 4), max_num_seqs=1, max_num_batched_tokens=4, max_model_len=16)
    with pytest.raises(ValueError, match=message):
        scheduler.add(Sequence("a", prompt, max_tokens))
    assert not scheduler.has_work


def test_a_key_in_use_is_refused() -> None:
    scheduler = Scheduler(BlockPool(4, 4), max_num_seqs=1, max_num_batched_tokens=4, max_model_len=16)
    scheduler.add(Sequence("a", [1], 1))
    with pytest.raises(ValueError, match="'a' exists already"):
        scheduler.add(Sequence("a", [2], 1))
