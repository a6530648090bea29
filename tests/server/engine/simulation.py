"""A scheduler driven step by step, with a fake model and every promise checked at every step.

The fake model keeps, in place of keys and values, the tokens they would have been computed from, so a block that is
stale, wrongly shared or overwritten is seen by the first step that reads it.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from collections.abc import Sequence as Ids
from operator import attrgetter
from zlib import crc32

import msgspec

from server.engine.blocks import BlockPool
from server.engine.messages import EngineStats, Pooling
from server.engine.scheduler import Advance, ScheduledSequence, Scheduler, StepPlan
from server.engine.sequence import Sequence

_rank = attrgetter("rank")

VOCABULARY = 3
"""So few tokens that prompts and answers often share prefixes."""


def next_token(token_ids: Ids[int], sample_index: int = 0) -> int:
    """What the fake model says after these tokens; samples of one prompt differ."""
    return crc32(bytes([*token_ids, *[255] * sample_index])) % VOCABULARY


def generate_alone(
    prompt: Ids[int], max_tokens: int, stop_token_ids: Iterable[int] = (), sample_index: int = 0
) -> tuple[list[int], str]:
    """The answer and finish reason of a sequence that shares the machine with nobody."""
    token_ids, stops = list(prompt), set(stop_token_ids)
    for _ in range(max_tokens):
        token_ids.append(next_token(token_ids, sample_index))
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
        self._copy(plan)
        for item in plan.scheduled:
            self._read(item, item.start)
        for item in plan.scheduled:
            for position in range(item.start, item.start + item.count):
                prefix = tuple(item.sequence.token_ids[: position + 1])
                self._slots[self._slot(item.sequence, position)] = prefix
        for item in plan.scheduled:
            self._read(item, item.start + item.count)
        return [next_token(sample.token_ids, sample.sample_index) for item in plan.scheduled for sample in item.samples]

    def _copy(self, plan: StepPlan) -> None:
        size = self._block_size
        targets = [target for _, target in plan.copies]
        assert len(set(targets)) == len(targets), "two blocks are copied into one"
        before = list(self._slots)
        for source, target in plan.copies:
            self._slots[target * size : (target + 1) * size] = before[source * size : (source + 1) * size]

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
        """How many sequences were aborted in which state."""
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._model = FakeModel(num_blocks, block_size)
        self._sampled: list[int] = []
        self._first_hits: dict[int, int] = {}
        self._families: dict[int, int] = {}
        self._counted: set[int] = set()
        self._reported: Counter[Hashable] = Counter()
        self._expected = EngineStats(
            running=0, waiting=0, free_blocks=num_blocks, total_blocks=num_blocks, steps=0, prompt_tokens=0,
            generated_tokens=0, cached_tokens=0, queried_tokens=0, preemptions=0, recomputed_tokens=0,
        )  # fmt: skip

    @property
    def stats(self) -> EngineStats:
        return self.scheduler.stats()

    @property
    def running(self) -> list[Sequence]:
        """Live sequences that hold blocks, by rank."""
        return sorted((sequence for sequence in self.live.values() if sequence.block_table), key=_rank)

    @property
    def started(self) -> list[Sequence]:
        """Live sequences that hold blocks, and those that will share them from the end of the prompt on."""
        return [
            sequence
            for sequence in self.live.values()
            if sequence.block_table or (sequence.leader is not None and sequence.leader.block_table)
        ]

    @property
    def waiting(self) -> list[Sequence]:
        """All other live sequences."""
        started = self.started
        return [sequence for sequence in self.live.values() if sequence not in started]

    def add(
        self,
        prompt: Ids[int],
        max_tokens: int,
        stop_token_ids: Iterable[int] = (),
        *,
        samples: int = 1,
        pooling: Pooling | None = None,
        priority: int = 0,
    ) -> Sequence:
        """A prompt with so many samples, the first of which is returned; the keys of the others follow its own."""
        stops = frozenset(stop_token_ids)
        forks = [
            Sequence(self.arrivals + index, list(prompt), max_tokens, stops, sample_index=index, priority=priority)
            for index in range(1, samples)
        ]
        sequence = Sequence(
            self.arrivals, list(prompt), max_tokens, stops, pooling=pooling, forks=forks, priority=priority
        )
        family, first = sequence.family, self.arrivals
        self.scheduler.add(sequence)
        for own in family:
            self._families[self.arrivals] = first
            self.live[self.arrivals] = own
            self.arrivals += 1
        self.check()
        return sequence

    def abort(self, key: int) -> None:
        ended = self.finished.get(key)
        reason = ended.finish_reason if ended else None
        sequence = self.live.pop(key, None)
        if sequence is not None:
            self.aborts[self._state(sequence)] += 1
        self.scheduler.abort(key)
        assert ended is None or ended.finish_reason == reason
        assert sequence is None or (sequence.finish_reason == "abort" and sequence.block_table == [])
        self.check()

    def plan(self) -> StepPlan:
        """Plans a step and runs it; `commit` ends it."""
        assert self.plan_under_way is None
        before = {key: (own.num_computed, list(own.block_table)) for key, own in self.live.items()}
        decoding = [sequence for sequence in self.running if sequence.num_uncomputed == 1]
        missing = sum(map(self._needs_a_block, decoding)) - self.pool.num_free
        plan = self.scheduler.plan()
        preempted = self._account_for(before, plan)
        assert not preempted or missing > 0, "sequences were preempted although there were free blocks"
        held = [own for key, own in self.live.items() if before[key][1] and own not in preempted]
        assert all(lost.rank > own.rank for lost in preempted for own in held), "the last by rank are preempted"
        self._check_plan(plan, [sequence for sequence in decoding if sequence not in preempted])
        self._sampled = self._model.run(plan)
        self.plan_under_way = plan
        self.check()
        return plan

    def commit(self) -> list[Advance]:
        plan = self.plan_under_way
        assert plan is not None
        expected = []
        row = 0
        for item in plan.scheduled:
            for sample in item.samples:
                if not sample.finished:
                    expected.append(Advance(sample, self._sampled[row], row))
                row += 1
            sequence = item.sequence
            if not sequence.finished:
                self._reported[sequence.key] = max(self._reported[sequence.key], min(item.end, sequence.prompt_length))
                if sequence.max_tokens == 0 and item.end == sequence.prompt_length:
                    expected.append(Advance(sequence, None, row))
        advanced = self.scheduler.commit(plan, self._sampled)
        assert advanced == expected
        self.plan_under_way = None
        sampled = [advance for advance in advanced if advance.token is not None]
        self._expected = msgspec.structs.replace(
            self._expected,
            steps=self._expected.steps + 1,
            generated_tokens=self._expected.generated_tokens + len(sampled),
        )
        for advance in sampled:
            assert advance.sequence.token_ids[-1] == advance.token
        for advance in advanced:
            if advance.sequence.finished:
                self._check_finished(advance.sequence)
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
        assert not self.scheduler._promised

    def check(self) -> None:
        """What holds at any moment."""
        references = Counter(block for sequence in self.live.values() for block in sequence.block_table)
        for block in range(self.pool.num_blocks):
            assert self.pool._references[block] == references[block], f"references of block {block}"
            assert self.pool.is_free(block) == (references[block] == 0)
        started, waiting = self.started, self.waiting
        assert len(started) == self.scheduler.num_running <= self._max_num_seqs
        assert len(waiting) == self.scheduler.num_waiting
        assert self.scheduler.has_work == bool(self.live)
        assert all(sequence.num_computed == 0 for sequence in waiting)
        # Of each priority in the order of arrival: nobody runs whom somebody who waits was before.
        for priority in {sequence.priority for sequence in self.live.values()}:
            of_it = [sequence.priority == priority for sequence in self.live.values()]
            runs = [sequence in started for sequence, own in zip(self.live.values(), of_it, strict=True) if own]
            assert runs == sorted(runs, reverse=True)
        self._expected = msgspec.structs.replace(
            self._expected,
            running=len(started),
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
        assert sum(len(item.samples) for item in plan.scheduled) <= self._max_num_seqs
        assert bool(scheduled) == bool(self.live)
        if self.running:
            assert self.running[0] in scheduled, "the oldest sequence does not advance"
        assert scheduled[: len(decoding)] == decoding, "decodes come first, and all that were not preempted"
        for sequence in self.running:
            assert len(sequence.block_table) == self.pool.blocks_for(sequence.num_tokens)
        for item in plan.scheduled:
            sequence, end = item.sequence, item.end
            assert item.start == sequence.num_computed
            assert item.start < end <= sequence.num_tokens
            assert item.samples[:1] == ((sequence,) if end == sequence.num_tokens and sequence.max_tokens else ())
            self._check_report(item)
            size = self.pool.block_size
            readers = max(1, len(item.samples))
            for block in sequence.block_table[item.start // size : self.pool.blocks_for(end)]:
                assert self.pool._references[block] == readers, f"a step writes block {block}, which others read"

    def _check_report(self, item: ScheduledSequence) -> None:
        """Each position whose state is wanted is reported by the step that computes it, and none twice."""
        sequence = item.sequence
        first_wanted = {None: sequence.prompt_length, "last": sequence.prompt_length - 1}.get(sequence.pooling, 0)
        first = max(first_wanted, self._reported[sequence.key])
        assert item.report_from == (first if first < min(item.end, sequence.prompt_length) else item.end)
        assert item.report_from >= item.start

    def _check_finished(self, sequence: Sequence) -> None:
        (key,) = (key for key, own in self.live.items() if own is sequence)
        prompt, output = (
            sequence.token_ids[: sequence.prompt_length],
            sequence.token_ids[sequence.prompt_length :],
        )
        alone = generate_alone(prompt, sequence.max_tokens, sequence.stop_token_ids, sequence.sample_index)
        assert (output, sequence.finish_reason) == alone
        if key in self._first_hits:
            assert sequence.cached_tokens == self._first_hits[key]
        assert sequence.num_reported == sequence.prompt_length
        self.finished[key] = self.live.pop(key)

    def _account_for(self, before: dict[int, tuple[int, list[int]]], plan: StepPlan) -> list[Sequence]:
        """Adds to the expected totals what a plan did, as seen from the block tables before and after it.

        Returns:
            The sequences it preempted.  Some may have come straight back: where twins had computed the same prefix
            side by side, the one that was preempted can share the other's blocks.
        """
        preempted = []
        begun = [fork for item in plan.scheduled for fork in item.samples[1:]]
        prompt_tokens = cached_tokens = queried_tokens = recomputed_tokens = 0
        for key, sequence in self.live.items():
            if sequence in begun:
                continue
            num_computed, block_table = before[key]
            kept = (
                block_table != []
                and len(sequence.block_table) >= len(block_table)
                and sequence.num_computed == num_computed
                and all(
                    now == then or (then, now) in plan.copies
                    for now, then in zip(sequence.block_table, block_table, strict=False)
                )
            )
            if block_table and not kept:
                preempted.append(sequence)
                recomputed_tokens += num_computed
            if sequence.block_table and not kept:
                cached_tokens += sequence.num_computed
                queried_tokens += sequence.num_tokens
                # The prompt of several samples counts once, and so do the hits of the first that is admitted.
                if self._families[key] not in self._counted:
                    self._counted.add(self._families[key])
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

    def _needs_a_block(self, sequence: Sequence) -> bool:
        """Whether its next token fits into no block of its own."""
        index = sequence.num_computed // self.pool.block_size
        return index == len(sequence.block_table) or self.pool.is_shared(sequence.block_table[index])

    def _state(self, sequence: Sequence) -> str:
        under_way = self.plan_under_way.scheduled if self.plan_under_way else []
        if any(sequence in (item.sequence, *item.samples) for item in under_way):
            return "in a step"
        if sequence.leader is not None:
            return "before its prompt was computed by another"
        kind = "running" if sequence.block_table else "queued"
        return f"{kind}, before others with its prompt" if sequence.forks else kind
