"""While long prompts arrive, streams keep their pace and no newcomer starves; on a machine with a clock of its own."""

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from persimmon.server.engine.blocks import BlockPool
from persimmon.server.engine.scheduler import Scheduler
from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.short_steps import MAX_SHORT_STEPS, SHORT_SHARE
from persimmon.server.engine.step_cost import SHARED_SECONDS, StepCostModel, StepCosts, StepWork
from persimmon.server.engine.step_plan import StepPlan

STREAMS, LONG, SHORT = 32, 16_384, 64
MACHINE = StepCosts(
    step=8e-3, decode=1e-4, decode_context=2e-8, chunks=1e-3, chunk_token=1e-4, chunk_context=1e-9, chunk_reach=1e-7
)
"""A step of 32 streams takes 12 ms, a prompt of 16k tokens alone 1.9 s."""


class Server:
    """A scheduler on a machine with a clock of its own.

    Args:
        machine: what steps take there.
        longest: the limit on the time between two tokens.
        max_num_seqs: of the scheduler.
    """

    def __init__(self, machine: StepCosts = MACHINE, longest: float | None = None, max_num_seqs: int = 128) -> None:
        self.scheduler = Scheduler(
            BlockPool(8192, 32, prefix_caching=False),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=2048,
            max_model_len=3 * LONG,
        )
        self.machine = machine
        self.model = StepCostModel(longest)
        self.steps: list[tuple[StepPlan, float]] = []
        self.now = 0.0
        self.times: dict[Sequence, list[float]] = {}
        self._rng = Random(0)

    def add(self, prompt_length: int, max_tokens: int, owner: str = "") -> Sequence:
        sequence = Sequence(len(self.times), [7] * prompt_length, max_tokens, owner=owner)
        self.times[sequence] = [self.now]
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> None:
        plan = self.scheduler.plan(self.model.costs)
        seconds = self.machine.seconds(plan.work) * self._rng.gauss(1, 0.03)
        self.now += seconds
        self.steps.append((plan, seconds))
        self.model.observe(plan.work, seconds)
        for advance in self.scheduler.commit(plan, [[7]] * plan.num_samples):
            self.times[advance.sequence].append(self.now)

    def ttft(self, sequence: Sequence) -> float:
        while len(self.times[sequence]) < 2:
            self.step()
        return self.times[sequence][1] - self.times[sequence][0]

    def time_to_end(self, sequence: Sequence) -> float:
        begun = self.now
        while not sequence.finished:
            self.step()
        return self.now - begun

    def p99(self, sequences: list[Sequence], since: float) -> float:
        """Of what lies between their tokens."""
        gaps = []
        for sequence in sequences:
            times = [own for own in self.times[sequence][1:] if own >= since]
            gaps += [later - earlier for earlier, later in pairwise(times)]
        return sorted(gaps)[int(0.99 * len(gaps))]


def busy_server() -> tuple[Server, list[Sequence]]:
    server = Server()
    streams = [server.add(SHORT, LONG) for _ in range(STREAMS)]
    for _ in range(300):
        server.step()
    return server, streams


def test_streams_keep_their_pace_while_long_prompts_arrive() -> None:
    server, streams = busy_server()
    quiet = server.p99(streams, since=server.now / 2)
    begun = server.now
    for _ in range(2):
        first, second = server.add(LONG, 1), server.add(LONG, 1)
        server.ttft(first)
        server.ttft(second)
    assert server.p99(streams, since=begun) < 2 * quiet


def test_a_long_prompt_is_not_held_up_for_ever_by_streams_and_short_prompts() -> None:
    alone = Server()
    of_one_alone = alone.ttft(alone.add(LONG, 1))
    server, _ = busy_server()
    long = server.add(LONG, 1)
    while len(server.times[long]) < 2:
        server.add(SHORT, 1)
        server.step()
    # Streams have half of the time and short prompts, of which there are always some, half of the rest.
    assert server.ttft(long) < 8 * of_one_alone


def test_a_short_prompt_does_not_wait_for_the_long_ones_before_it() -> None:
    server, _ = busy_server()
    for _ in range(3):
        server.add(LONG, 1)
    server.step()
    for _ in range(20):
        assert server.ttft(server.add(SHORT, 1)) < 0.15
    assert server.scheduler.num_running > STREAMS


def test_those_who_come_together_do_not_wait_for_the_pace_of_the_first() -> None:
    server = Server()
    for _ in range(3):
        together = [server.add(SHORT, 40) for _ in range(64)]
        last = max(server.ttft(sequence) for sequence in together)
        while server.scheduler.has_work:
            server.step()
    # Those who came first decode meanwhile, at a slower pace.
    assert last < 2 * MACHINE.seconds(
        StepWork(decodes=0, decode_context=0, chunk_tokens=64 * SHORT, chunk_context=64 * SHORT * SHORT // 2)
    )


def test_prompts_that_keep_coming_do_not_leave_few_sequences_to_decode() -> None:
    server = Server(FIXED, max_num_seqs=256)
    rng = Random(1)

    def add() -> Sequence:
        return server.add(rng.randint(16, 384), rng.randint(16, 256))

    live = [add() for _ in range(256)]
    server.steps.clear()
    while len(server.times) < 768:
        server.step()
        live = [add() if own.finished else own for own in live]
    in_turn = sorted(server.ttft(own) for own in server.times)
    decodes = [plan.work.decodes for plan, _ in server.steps[len(server.steps) // 4 :]]
    assert sum(decodes) / len(decodes) > 0.75 * 256
    assert in_turn[int(0.9 * len(in_turn))] < 2.0


def test_few_prompts_leave_streams_their_pace_and_many_take_more_time() -> None:
    alone = MACHINE.chunk_seconds(32, 0, 1) + MACHINE.chunks
    assert MACHINE.chunk_seconds(32, 0, 4) == MACHINE.chunk_seconds(32, 0, 1)
    assert MACHINE.chunk_seconds(32, 0, 8) + MACHINE.chunks == pytest.approx(2 * alone)


def test_many_prompts_keep_an_explicit_limit() -> None:
    costs = replace(MACHINE, longest=0.02)
    assert costs.chunk_seconds(32, 0, 32) == costs.chunk_seconds(32, 0, 1)


FIXED = StepCosts(
    step=12e-3, decode=2e-5, decode_context=2e-8, chunks=1e-3, chunk_token=3e-5, chunk_context=1e-9, chunk_reach=1e-7
)
"""As on a GPU, a step of 16 streams takes nearly as long as one of 256."""

CPU = StepCosts(
    step=1e-3, decode=4e-4, decode_context=2e-8, chunks=1e-4, chunk_token=2e-4, chunk_context=1e-9, chunk_reach=1e-7
)
"""A step of 128 streams takes 52 ms, one of a single stream 1.4 ms."""


def quiet_server(machine: StepCosts, longest: float | None = None) -> Server:
    """A client is known, and so are the costs."""
    server = Server(machine, longest)
    for _ in range(30):
        server.time_to_end(server.add(40, 3, "few"))
    server.steps.clear()
    return server


def flooded_server(machine: StepCosts = CPU, longest: float | None = None) -> Server:
    """One client has all places and 600 more sequences that wait."""
    server = quiet_server(machine, longest)
    for _ in range(728):
        server.add(SHORT, LONG, "many")
    for _ in range(60):
        server.step()
    server.steps.clear()
    return server


def test_few_tokens_of_one_client_take_hardly_longer_than_the_step_that_runs_for_another() -> None:
    server = flooded_server()
    longest = 0.0
    for _ in range(20):
        server.step()
        longest = max(longest, server.time_to_end(server.add(SHORT, 4, "few")))
    assert longest < 1.5 * max(seconds for plan, seconds in server.steps if not plan.short)


def test_the_client_with_many_keeps_most_of_the_time() -> None:
    server = flooded_server()
    for _ in range(40):
        server.time_to_end(server.add(SHORT, 50, "few"))
    full = [seconds for plan, seconds in server.steps if not plan.short]
    assert sum(full) * (1 + SHORT_SHARE) > 0.97 * sum(seconds for _, seconds in server.steps)
    assert len(full) < len(server.steps) / 4
    in_a_row = 0
    for plan, _ in server.steps:
        in_a_row = in_a_row + 1 if plan.short else 0
        assert in_a_row <= MAX_SHORT_STEPS


def test_a_long_prompt_of_a_client_with_little_stretches_short_steps_no_further() -> None:
    server = flooded_server()
    server.time_to_end(server.add(LONG, 1, "few"))
    full = [seconds for plan, seconds in server.steps if not plan.short]
    short = [seconds for plan, seconds in server.steps if plan.short]
    assert short
    assert max(short) < 1.5 * SHORT_SHARE * max(full)


def test_steps_are_for_all_where_a_short_one_takes_nearly_as_long() -> None:
    server = flooded_server(MACHINE)
    server.time_to_end(server.add(SHORT, 20, "few"))
    assert not any(plan.short for plan, _ in server.steps)


def test_steps_are_for_all_while_no_sequence_waits() -> None:
    server = quiet_server(CPU)
    for _ in range(100):
        server.add(SHORT, LONG, "many")
    for _ in range(60):
        server.step()
    server.time_to_end(server.add(SHORT, 20, "few"))
    assert not any(plan.short for plan, _ in server.steps)


def test_short_steps_keep_the_limit_on_the_time_between_tokens() -> None:
    server = flooded_server(longest=0.06)
    stream = min((own for own in server.times if not own.finished and own.block_table), key=lambda own: own.age)
    since = server.now
    for _ in range(20):
        server.time_to_end(server.add(SHORT, 30, "few"))
    assert server.p99([stream], since) < 0.06 * 1.15


def test_prompts_take_a_bounded_time_while_clients_share_the_engine() -> None:
    server = quiet_server(CPU)
    for _ in range(200):
        server.add(LONG // 16, 1, "many")
    for _ in range(50):
        server.step()
    assert max(seconds for _, seconds in server.steps) < 1.2 * SHARED_SECONDS
