"""A scheduler driven step by step, with a fake model and every promise checked at every step.

The fake model keeps, in place of keys and values, the tokens they would have been computed from, so a block that is
stale, wrongly shared or overwritten is seen by the first step that reads it.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ids
from zlib import crc32

import msgspec

from server.engine.blocks import BlockPool
from server.engine.messages import EngineStats
from server.engine.scheduler import ScheduledSequence, Scheduler, StepPlan
from server.engine.sequence import Sequence

VOCABULARY = 3
"""So few tokens that prompts and answers often share prefixes."""


def next_token(token_ids: Ids[int]) -> int:
    """What the fake model says after these tokens."""
    return crc32(bytes(token_ids)) % VOCABULARY


def generate_alone(prompt: Ids[int], max_tokens: int, stop_token_ids: Iterable[int] = ()) -> tuple[list[int], str]:
    """The answer and finish reason of a sequence that shares the machine with nobody."""
    token_ids, stops = list(prompt), set(stop_token_ids)
    for _ in range(max_tokens):
        token_ids.append(next_token(token_ids))
        if token_ids[-1] in stops:
            return token_ids[len(prompt) :], "stop"
    return token_ids[len(prompt) :], "length"


class FakeModel:
    """Runs plans over a cache whose slots remember which tokens their content depends on."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._slots: list[tuple[int, ...] | None] = [None] * (num_blocks * block_size)

    def run(self, plan: StepPlan) -> list[int]:
        """Computes what was planned and samples, reading the cache before and after all writes of the step."""
        for item in plan.scheduled:
            self._read(item, item.start)
        for item in plan.scheduled:
            for position in range(item.start, item.start + item.count):
                prefix = tuple(item.sequence.token_ids[: position + 1])
                self._slots[self._slot(item.sequence, position)] = prefix
        for item in plan.scheduled:
            self._read(item, item.start + item.count)
        return [next_token(item.sequence.token_ids) for item in plan.scheduled if item.samples]

    def _read(self, item: ScheduledSequence, end: int) -> None:
        for position in range(end):
            held = self._slots[self._slot(item.sequence, position)]
            wanted = tuple(item.sequence.token_ids[: position + 1])
            assert held == wanted, f"position {position} of {item.sequence.key} attends to {held}, not {wanted}"

    def _slot(self, sequence: Sequence, position: int) -> int:
        block = sequence.block_table[position // self._block_size]
        return block * self._block_size + position % self._block_size


class Simulation:
    """A scheduler, its pool, a fake model, and a second account of what they should be doing.

    Sequences are keyed 0, 1, 2, ... in order of arrival.  Between `plan` and `commit` a step is under way.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        prefix_caching: bool = True,
    ) -> None:
        self.pool = BlockPool(num_blocks, block_size, prefix_caching=prefix_caching)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
        )
        self.max_model_len = max_model_len
        self.live: dict[int, Sequence] = {}
        self.finished: dict[int, Sequence] = {}
        self.arrivals = 0
        self.plan_under_way: StepPlan | None = None
        self.aborts: Counter[str] = Counter()
        """How many sequences were aborted in which state: "queued", "running" or "in a step"."""
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._model = FakeModel(num_blocks, block_size)
        self._sampled: list[int] = []
        self._first_hits: dict[int, int] = {}
        self._expected = EngineStats(
            running=0, waiting=0, free_blocks=num_blocks, total_blocks=num_blocks, steps=0, prompt_tokens=0,
            generated_tokens=0, cached_tokens=0, queried_tokens=0, preemptions=0, recomputed_tokens=0,
        )  # fmt: skip

    @property
    def stats(self) -> EngineStats:
        return self.scheduler.stats()

    @property
    def running(self) -> list[Sequence]:
        """Live sequences that hold blocks, oldest first."""
        return [sequence for sequence in self.live.values() if sequence.block_table]

    @property
    def waiting(self) -> list[Sequence]:
        """Live sequences that hold none, oldest first."""
        return [sequence for sequence in self.live.values() if not sequence.block_table]

    def add(self, prompt: Ids[int], max_tokens: int, stop_token_ids: Iterable[int] = ()) -> Sequence:
        sequence = Sequence(self.arrivals, list(prompt), max_tokens, frozenset(stop_token_ids))
        self.scheduler.add(sequence)
        self.live[self.arrivals] = sequence
        self.arrivals += 1
        self.check()
        return sequence

    def abort(self, key: int) -> None:
        ended = self.finished.get(key)
        reason = ended.finish_reason if ended else None
        sequence = self.live.pop(key, None)
        if sequence is not None:
            under_way = self.plan_under_way.scheduled if self.plan_under_way else []
            in_step = any(item.sequence is sequence for item in under_way)
            self.aborts["in a step" if in_step else "running" if sequence.block_table else "queued"] += 1
        self.scheduler.abort(key)
        assert ended is None or ended.finish_reason == reason
        assert sequence is None or (sequence.finish_reason == "abort" and sequence.block_table == [])
        self.check()

    def plan(self) -> StepPlan:
        """Plans a step and runs it; `commit` ends it."""
        assert self.plan_under_way is None
        before = {key: (own.num_computed, list(own.block_table)) for key, own in self.live.items()}
        decoding = [sequence for sequence in self.running if sequence.num_uncomputed == 1]
        missing = sum(map(self._table_is_full, decoding)) - self.pool.num_free
        plan = self.scheduler.plan()
        preempted = self._account_for(before)
        assert not preempted or missing > 0, "sequences were preempted although there were free blocks"
        self._check_plan(plan, [sequence for sequence in decoding if sequence not in preempted])
        self._sampled = self._model.run(plan)
        self.plan_under_way = plan
        self.check()
        return plan

    def commit(self) -> list[tuple[Sequence, int]]:
        plan = self.plan_under_way
        assert plan is not None
        sampling = [item.sequence for item in plan.scheduled if item.samples]
        drawn = list(zip(sampling, self._sampled, strict=True))
        expected = [(sequence, token) for sequence, token in drawn if not sequence.finished]
        advanced = self.scheduler.commit(plan, self._sampled)
        assert advanced == expected
        self.plan_under_way = None
        self._expected = msgspec.structs.replace(
            self._expected,
            steps=self._expected.steps + 1,
            generated_tokens=self._expected.generated_tokens + len(advanced),
        )
        for sequence, token in advanced:
            assert sequence.token_ids[-1] == token
            if sequence.finished:
                self._check_finished(sequence)
        self.check()
        return advanced

    def step(self) -> StepPlan:
        plan = self.plan()
        self.commit()
        return plan

    def step_until(self, happened: Callable[[], bool]) -> None:
        """Steps until this is so, which it must be before everything has finished."""
        for _ in range(self._steps_left()):
            if happened():
                return
            self.step()
        assert happened()

    def drain(self) -> None:
        """Runs until all sequences have finished, which takes no more steps than they have tokens."""
        if self.plan_under_way is not None:
            self.commit()
        for _ in range(self._steps_left()):
            if self.live:
                self.step()
        assert not self.live, f"sequences {list(self.live)} never finished"
        assert not self.scheduler.has_work
        assert self.pool.num_free == self.pool.num_blocks

    def check(self) -> None:
        """What holds at any moment."""
        references = Counter(block for sequence in self.live.values() for block in sequence.block_table)
        for block in range(self.pool.num_blocks):
            assert self.pool._references[block] == references[block], f"references of block {block}"
            assert self.pool.is_free(block) == (references[block] == 0)
        running, waiting = self.running, self.waiting
        assert len(running) == self.scheduler.num_running <= self._max_num_seqs
        assert len(waiting) == self.scheduler.num_waiting
        assert self.scheduler.has_work == bool(self.live)
        assert all(sequence.num_computed == 0 for sequence in waiting)
        # In order of arrival: nobody runs whom somebody who waits was before.
        assert list(self.live.values()) == running + waiting
        self._expected = msgspec.structs.replace(
            self._expected,
            running=len(running),
            waiting=len(waiting),
            free_blocks=self.pool.num_blocks - len(references),
        )
        assert self.stats == self._expected

    def _steps_left(self) -> int:
        # Each step computes at least a token of the oldest sequence, and that one is never preempted.
        return sum(sequence.prompt_length + sequence.max_tokens for sequence in self.live.values())

    def _check_plan(self, plan: StepPlan, decoding: list[Sequence]) -> None:
        scheduled = [item.sequence for item in plan.scheduled]
        assert len(set(map(id, scheduled))) == len(scheduled), "a sequence was scheduled twice"
        assert plan.num_tokens <= self._max_num_batched_tokens
        assert bool(scheduled) == bool(self.live)
        if self.running:
            assert self.running[0] in scheduled, "the oldest sequence does not advance"
        assert scheduled[: len(decoding)] == decoding, "decodes come first, and all that were not preempted"
        for sequence in self.running:
            assert len(sequence.block_table) == self.pool.blocks_for(sequence.num_tokens)
        for item in plan.scheduled:
            sequence, end = item.sequence, item.start + item.count
            assert item.start == sequence.num_computed
            assert item.start < end <= sequence.num_tokens
            assert item.samples == (end == sequence.num_tokens)
            size = self.pool.block_size
            for block in sequence.block_table[item.start // size : self.pool.blocks_for(end)]:
                assert self.pool._references[block] == 1, f"a step writes block {block}, which others read"

    def _check_finished(self, sequence: Sequence) -> None:
        (key,) = (key for key, own in self.live.items() if own is sequence)
        prompt, output = (
            sequence.token_ids[: sequence.prompt_length],
            sequence.token_ids[sequence.prompt_length :],
        )
        alone = generate_alone(prompt, sequence.max_tokens, sequence.stop_token_ids)
        assert (output, sequence.finish_reason) == alone
        assert sequence.cached_tokens == self._first_hits[key]
        self.finished[key] = self.live.pop(key)

    def _account_for(self, before: dict[int, tuple[int, list[int]]]) -> list[Sequence]:
        """Adds to the expected totals what a plan did, as seen from the block tables before and after it.

        Returns:
            The sequences it preempted.  Some may have come straight back: where twins had computed the same prefix
            side by side, the one that was preempted can share the other's blocks.
        """
        preempted = []
        prompt_tokens = cached_tokens = queried_tokens = recomputed_tokens = 0
        for key, sequence in self.live.items():
            num_computed, block_table = before[key]
            kept = (
                sequence.num_computed == num_computed and sequence.block_table[: len(block_table)] == block_table != []
            )
            if block_table and not kept:
                preempted.append(sequence)
                recomputed_tokens += num_computed
            if sequence.block_table and not kept:
                cached_tokens += sequence.num_computed
                queried_tokens += sequence.num_tokens
                if key not in self._first_hits:
                    self._first_hits[key] = sequence.num_computed
                    prompt_tokens += sequence.prompt_length
        totals = self._expected
        self._expected = msgspec.structs.replace(
            totals,
            prompt_tokens=totals.prompt_tokens + prompt_tokens,
            cached_tokens=totals.cached_tokens + cached_tokens,
            queried_tokens=totals.queried_tokens + queried_tokens,
            preemptions=totals.preemptions + len(preempted),
            recomputed_tokens=totals.recomputed_tokens + recomputed_tokens,
        )
        return preempted

    def _table_is_full(self, sequence: Sequence) -> bool:
        return sequence.num_computed == len(sequence.block_table) * self.pool.block_size
