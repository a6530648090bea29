"""Ten thousand aborts, at any moment of anything: no block stays behind, and nothing that knew a sequence."""

import gc
import random
import weakref
from collections import Counter, deque
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

import pytest

from persimmon.model.sampling_params import SamplingParams
from persimmon.server.engine.blocks import BlockPool
from persimmon.server.engine.guesses import Speculation
from persimmon.server.engine.proposers import Proposal
from persimmon.server.engine.scheduler import Scheduler
from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.step_plan import StepPlan
from tests.server.engine.fake_model import VOCABULARY, generate_alone, next_token

ABORTS = 5_000
"""With steps that overlap, and as many without."""

MAX_MODEL_LEN = 40
STEMS = [[0, 1, 2, 0, 2, 1] * 4, [2, 2, 1, 0, 0, 1] * 4]


@dataclass
class Guesser:
    """Guesses right, right at first, wrong at first, or anything."""

    kind: str
    sample_index: int
    dice: random.Random

    def propose(self, token_ids: Ids[int], count: int) -> Proposal:
        if self.kind == "hostile":
            return Proposal(self.dice.choices(range(256), k=self.dice.randint(0, count)), 1)
        known = list(token_ids)
        for _ in range(min(count, 3)):
            known.append(next_token(known, self.sample_index))
            wrong = {"right": 0, "half right": 0.3, "wrong": 0.9}[self.kind]
            if self.dice.random() < wrong:
                known[-1] = (known[-1] + 1) % VOCABULARY
        return Proposal(known[len(token_ids) :], 1)


@dataclass
class Forced:
    """Forces what comes after every third token, and is sometimes wrong."""

    sample_index: int

    def guess(self, token_ids: Ids[int], count: int, others: Ids[int]) -> tuple[Ids[int], int]:
        if len(token_ids) % 3:
            return (), 0
        right = next_token(token_ids, self.sample_index)
        tokens = [right if len(token_ids) % 2 else (right + 1) % VOCABULARY, *others][:count]
        return tokens, 1


@dataclass
class RunnerState:
    """Stands for what a runner keeps with a sequence: where its grammar stands, and what its penalties count."""

    counts: dict[int, int] = field(default_factory=dict)


class Traffic:
    """Requests of all kinds for a scheduler with few blocks."""

    def __init__(self, seed: int, *, overlap: bool) -> None:
        self.dice = random.Random(seed)
        self.pool = BlockPool(16, 4, prefix_caching=True)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=6,
            max_num_batched_tokens=24,
            max_model_len=MAX_MODEL_LEN,
            typical_output=1,
            speculation=Speculation(self.guesser),
        )
        self.overlap = overlap
        self.under_way: deque[StepPlan] = deque()
        self.live: dict[int, Sequence] = {}
        self.arrivals = 0
        self.aborted: Counter[str] = Counter()
        """How many sequences were aborted in which state."""
        self.kept: list[weakref.ref[object]] = []
        """Everything that was made for sequences."""

    def guesser(self, sequence: Sequence) -> Guesser:
        guesser = Guesser(
            self.dice.choice(["right", "half right", "wrong", "hostile"]), sequence.sample_index, self.dice
        )
        self.kept.append(weakref.ref(guesser))
        return guesser

    def arrive(self) -> None:
        dice = self.dice
        prompt = [*dice.choice(STEMS)[: dice.randrange(18)], dice.randrange(VOCABULARY)]
        max_tokens = dice.choice([MAX_MODEL_LEN - len(prompt), 8, 1])
        stops = frozenset({0} if dice.random() < 0.2 else ())
        sampling = SamplingParams(presence_penalty=dice.choice([0.0, 0.0, 1.0]))
        priority, owner = dice.choice([0, 0, 1]), dice.choice(["", "", "other"])
        speculate = dice.random() < 0.9

        def sample(index: int, forks: list[Sequence]) -> Sequence:
            own = Sequence(
                key=self.arrivals + index,
                token_ids=list(prompt),
                max_tokens=max_tokens,
                stop_token_ids=stops,
                sampling=sampling,
                sample_index=index,
                forks=forks,
                priority=priority,
                owner=owner,
                speculate=speculate,
                forced=Forced(index) if dice.random() < 0.4 else None,
                runner_state=RunnerState(),
            )
            self.kept += map(weakref.ref, (own, own.runner_state))
            if own.forced is not None:
                self.kept.append(weakref.ref(own.forced))
            return own

        leader = sample(0, [sample(index, []) for index in range(1, dice.choice([1, 1, 1, 2, 4]))])
        self.scheduler.add(leader)
        for own in leader.family:
            self.live[self.arrivals] = own
            self.arrivals += 1

    def abort_some(self) -> None:
        """Aborts none, most often, so that some grow; or one, or most of those that live."""
        for _ in range(self.dice.choice([0, 0, 0, 0, 0, 1, 12])):
            if self.live:
                self._abort(self.dice.choice(list(self.live)))

    def _abort(self, key: int) -> None:
        sequence = self.live.pop(key)
        guessed = any(item.sequence is sequence and item.guesses for plan in self.under_way for item in plan.scheduled)
        state = "guessed" if guessed else "in a step" if sequence.steps_under_way else "outside of steps"
        self.aborted["a fork" if sequence.leader is not None else state] += 1
        self.scheduler.abort(key)

    def plan(self) -> None:
        plan = self.scheduler.plan_ahead() if self.under_way else self.scheduler.plan()
        if plan is not None and plan.scheduled:
            self.under_way.append(plan)

    def commit(self) -> None:
        """Ends the oldest step under way; every answer that is whole is the one of its sequence alone."""
        plan = self.under_way.popleft()
        drawn = [
            [self._drawn(sample, [*sample.token_ids[: item.end - len(item.guesses)], *item.guesses], later)
             for later in range(item.draws - 1, -1, -1)]
            for item in plan.scheduled
            for sample in item.samples
        ]  # fmt: skip
        for advance in self.scheduler.commit(plan, drawn):
            own = advance.sequence
            if own.finished:
                del self.live[own.key]  # type: ignore[arg-type]
                prompt, answer = own.token_ids[: own.prompt_length], own.token_ids[own.prompt_length :]
                alone = generate_alone(prompt, own.max_tokens, own.stop_token_ids, own.sample_index)
                assert (answer, own.finish_reason) == alone

    def _drawn(self, sample: Sequence, known: list[int], later: int) -> int:
        return 0 if sample.finished else next_token(known[: len(known) - later], sample.sample_index)


@pytest.mark.parametrize("overlap", [False, True])
def test_nothing_of_aborted_sequences_stays_behind(overlap: bool) -> None:
    traffic = Traffic(seed=overlap, overlap=overlap)
    dice = traffic.dice
    while traffic.aborted.total() < ABORTS:
        while len(traffic.live) < 16:
            traffic.arrive()
        traffic.abort_some()
        if len(traffic.under_way) < (2 if overlap else 1):
            traffic.plan()
        traffic.abort_some()
        if traffic.under_way and (len(traffic.under_way) == 2 or not overlap or dice.random() < 0.5):
            traffic.commit()
    stats = traffic.scheduler.stats()
    assert stats.preemptions > 20
    assert min(stats.cached_tokens, stats.accepted_tokens, stats.draft_tokens - stats.accepted_tokens) > 300
    assert min(traffic.aborted.values()) > 100
    assert traffic.aborted.keys() == {"a fork", "guessed", "in a step", "outside of steps"}

    for key in list(traffic.live):
        traffic.scheduler.abort(key)
    traffic.live.clear()
    while traffic.under_way:
        traffic.commit()
    assert not traffic.scheduler.has_work
    assert traffic.scheduler.num_running == traffic.scheduler.num_waiting == 0
    assert traffic.pool.num_free == traffic.pool.num_blocks
    assert sorted(traffic.pool.allocate(traffic.pool.num_blocks)) == list(range(traffic.pool.num_blocks))
    gc.collect()
    assert len(traffic.kept) > ABORTS
    assert [alive for reference in traffic.kept if (alive := reference()) is not None] == []
