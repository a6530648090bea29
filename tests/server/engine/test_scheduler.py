"""The scheduler: whatever arrives, in any order, every sequence gets the tokens that it would get alone."""

import random

import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from persimmon.server.engine.blocks import BlockPool
from persimmon.server.engine.messages import Pooling
from persimmon.server.engine.scheduler import Scheduler
from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.step_cost import GuessCosts, StepCosts
from tests.server.engine.fake_model import STEMS, VOCABULARY
from tests.server.engine.simulation import Simulation

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


def test_a_sequence_without_new_tokens_ends_with_its_prompt() -> None:
    simulation = Simulation(num_blocks=20, block_size=4, max_model_len=40, max_num_batched_tokens=8)
    only_prompt = simulation.add(STEMS[0][:13], 0, pooling="all")
    simulation.step()
    assert not only_prompt.finished
    simulation.step()
    assert only_prompt.finish_reason == "length"
    assert only_prompt.num_output_tokens == 0
    assert simulation.pool.num_free == 20


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
