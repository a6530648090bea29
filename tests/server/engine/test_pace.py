"""While long prompts arrive, streams keep their pace and no newcomer starves; on a machine with a clock of its own."""

from itertools import pairwise
from random import Random

from persimmon.server.engine.blocks import BlockPool
from persimmon.server.engine.scheduler import Scheduler
from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.step_cost import StepCostModel, StepCosts, StepWork

STREAMS, LONG, SHORT = 32, 16_384, 64
MACHINE = StepCosts(
    step=8e-3, decode=1e-4, decode_context=2e-8, chunks=1e-3, chunk_token=1e-4, chunk_context=1e-9, chunk_reach=1e-7
)
"""A step of 32 streams takes 12 ms, a prompt of 16k tokens alone 1.9 s."""


class Server:
    """A scheduler on a machine with a clock of its own."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(
            BlockPool(8192, 32, prefix_caching=False),
            max_num_seqs=128,
            max_num_batched_tokens=2048,
            max_model_len=3 * LONG,
        )
        self.model = StepCostModel()
        self.now = 0.0
        self.times: dict[Sequence, list[float]] = {}
        self._rng = Random(0)

    def add(self, prompt_length: int, max_tokens: int) -> Sequence:
        sequence = Sequence(len(self.times), [7] * prompt_length, max_tokens)
        self.times[sequence] = [self.now]
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> None:
        plan = self.scheduler.plan(self.model.costs)
        seconds = time_of(plan.work) * self._rng.gauss(1, 0.03)
        self.now += seconds
        self.model.observe(plan.work, seconds)
        for advance in self.scheduler.commit(plan, [[7]] * plan.num_samples):
            self.times[advance.sequence].append(self.now)

    def ttft(self, sequence: Sequence) -> float:
        while len(self.times[sequence]) < 2:
            self.step()
        return self.times[sequence][1] - self.times[sequence][0]

    def p99(self, sequences: list[Sequence], since: float) -> float:
        """Of what lies between their tokens."""
        gaps = []
        for sequence in sequences:
            times = [own for own in self.times[sequence][1:] if own >= since]
            gaps += [later - earlier for earlier, later in pairwise(times)]
        return sorted(gaps)[int(0.99 * len(gaps))]


def time_of(work: StepWork) -> float:
    chunks = MACHINE.chunks + MACHINE.chunk_token * work.chunk_tokens if work.chunk_tokens else 0.0
    reads = MACHINE.decode_context * work.decode_context + MACHINE.chunk_context * work.chunk_context
    return MACHINE.step + MACHINE.decode * work.decodes + chunks + reads + MACHINE.chunk_reach * work.chunk_reach


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
    assert last < 2 * time_of(
        StepWork(decodes=0, decode_context=0, chunk_tokens=64 * SHORT, chunk_context=64 * SHORT * SHORT // 2)
    )
