"""Which tokens run in the next step: plan() decides, commit() applies what the step sampled.

Decides and does nothing else: no tensors, no I/O, no clock.  Running sequences are ordered by arrival and the oldest
is never preempted, so everything that is admitted finishes.
"""

from collections import OrderedDict
from collections.abc import Hashable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from server.engine.blocks import BlockPool
from server.engine.messages import EngineStats
from server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """The part of a step that belongs to one sequence.

    Attributes:
        sequence: whose tokens.
        start: position of the first token to compute.
        count: how many tokens from there.
        samples: whether the step samples this sequence's next token; not so for a chunk that ends inside the prompt.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: sequences that decode come first, then prompt chunks."""

    scheduled: list[ScheduledSequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens the step computes."""
        return sum(item.count for item in self.scheduled)


class Scheduler:
    """Continuous batching over a block pool.

    Args:
        pool: the KV blocks.
        max_num_seqs: most sequences that hold blocks at once.
        max_num_batched_tokens: token budget of a step, at least max_num_seqs, so that every running sequence advances.
        max_model_len: most tokens of one sequence; the pool holds at least one such sequence.

    Raises:
        ValueError: the limits contradict each other.
    """

    def __init__(self, pool: BlockPool, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"a step of {max_num_batched_tokens} tokens cannot advance {max_num_seqs} running sequences"
            )
        if pool.blocks_for(max_model_len) > pool.num_blocks:
            raise ValueError(
                f"one sequence of {max_model_len} tokens needs {pool.blocks_for(max_model_len)} blocks, "
                f"the pool has {pool.num_blocks}"
            )
        self._pool = pool
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._waiting: OrderedDict[Hashable, Sequence] = OrderedDict()
        self._running: list[Sequence] = []
        self._by_key: dict[Hashable, Sequence] = {}
        self._steps = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._cached_tokens = 0
        self._queried_tokens = 0
        self._preemptions = 0
        self._recomputed_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether plan() would schedule anything."""
        return bool(self._by_key)

    @property
    def num_waiting(self) -> int:
        """Sequences without blocks."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with blocks."""
        return len(self._running)

    def stats(self) -> EngineStats:
        """Levels and totals, for metrics."""
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            free_blocks=self._pool.num_free,
            total_blocks=self._pool.num_blocks,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            cached_tokens=self._cached_tokens,
            queried_tokens=self._queried_tokens,
            preemptions=self._preemptions,
            recomputed_tokens=self._recomputed_tokens,
        )

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence behind all that came before it.

        Raises:
            ValueError: it is empty, asks for nothing, could outgrow max_model_len, or its key is in use.
        """
        if sequence.prompt_length < 1 or sequence.max_tokens < 1:
            raise ValueError(
                f"a sequence needs a prompt and room for an answer, not {sequence.prompt_length} prompt tokens "
                f"and {sequence.max_tokens} new ones"
            )
        if sequence.prompt_length + sequence.max_tokens > self._max_model_len:
            raise ValueError(
                f"{sequence.prompt_length} prompt tokens and {sequence.max_tokens} new ones "
                f"are more than the {self._max_model_len} that a sequence may have"
            )
        if sequence.key in self._by_key:
            raise ValueError(f"sequence {sequence.key!r} exists already")
        self._by_key[sequence.key] = sequence
        self._waiting[sequence.key] = sequence

    def abort(self, key: Hashable) -> None:
        """Ends a sequence at once; its blocks are free when this returns.  Unknown keys are ignored."""
        sequence = self._by_key.pop(key, None)
        if sequence is None:
            return
        sequence.finish_reason = "abort"
        if self._waiting.pop(key, None) is None:
            self._running.remove(sequence)
            self._release(sequence)

    def plan(self) -> StepPlan:
        """Fills one step: a token for each decoding sequence, then prompt chunks, oldest first.

        Reserves the blocks that the step writes, preempting the newest sequences when there are too few.
        """
        plan = StepPlan()
        budget = self._max_num_batched_tokens - self._plan_decodes(plan)
        budget -= self._plan_chunks(plan, budget)
        self._admit(plan, budget)
        return plan

    def commit(self, plan: StepPlan, sampled: Ids[int]) -> list[tuple[Sequence, int]]:
        """Applies a finished step.

        Args:
            plan: what ran.
            sampled: one token for each scheduled sequence that samples, in the plan's order.

        Returns:
            Each sequence that got a token, with that token.  Those that are `finished` hold no blocks any more.
            Sequences aborted since the plan was made are left out.

        Raises:
            ValueError: there are fewer or more tokens than sequences that sample.
        """
        wanted = sum(item.samples for item in plan.scheduled)
        if len(sampled) != wanted:
            raise ValueError(f"the step sampled {len(sampled)} tokens for {wanted} sequences")
        self._steps += 1
        tokens = iter(sampled)
        advanced: list[tuple[Sequence, int]] = []
        any_finished = False
        for item in plan.scheduled:
            token = next(tokens) if item.samples else None
            sequence = item.sequence
            if sequence.finished:
                continue
            sequence.num_computed = item.start + item.count
            if self._pool.prefix_caching:
                self._index_full_blocks(sequence, item.start)
            if token is not None:
                self._generated_tokens += 1
                advanced.append((sequence, token))
                if sequence.append(token):
                    any_finished = True
                    del self._by_key[sequence.key]
                    self._release(sequence)
        if any_finished:
            self._running = [sequence for sequence in self._running if not sequence.finished]
        return advanced

    def _plan_decodes(self, plan: StepPlan) -> int:
        # Victims are taken from the end of the list and this loop starts at its beginning, so none is scheduled yet.
        position = 0
        while position < len(self._running):
            sequence = self._running[position]
            if sequence.num_uncomputed == 1 and self._reserve_next(sequence):
                plan.scheduled.append(ScheduledSequence(sequence, sequence.num_computed, 1, samples=True))
            position += 1
        return len(plan.scheduled)

    def _plan_chunks(self, plan: StepPlan, budget: int) -> int:
        used = 0
        for sequence in self._running:
            if used == budget:
                break
            if sequence.num_uncomputed > 1:
                used += self._plan_chunk(plan, sequence, budget - used)
        return used

    def _plan_chunk(self, plan: StepPlan, sequence: Sequence, budget: int) -> int:
        count = min(sequence.num_uncomputed, budget)
        samples = count == sequence.num_uncomputed
        plan.scheduled.append(ScheduledSequence(sequence, sequence.num_computed, count, samples))
        return count

    def _admit(self, plan: StepPlan, budget: int) -> None:
        while self._waiting and budget > 0 and len(self._running) < self._max_num_seqs:
            sequence = next(iter(self._waiting.values()))
            hits = self._prefix_hits(sequence)
            needed = self._pool.blocks_for(sequence.num_tokens) - len(hits)
            available = self._pool.num_free - sum(map(self._pool.is_free, hits))
            # Each running sequence may soon want one more block; without that headroom a sequence that was just
            # preempted would come straight back, only to be preempted again.
            if needed + len(self._running) > available:
                return
            del self._waiting[sequence.key]
            self._pool.share(hits)
            sequence.block_table = hits + self._pool.allocate(needed)
            sequence.num_computed = len(hits) * self._pool.block_size
            self._running.append(sequence)
            self._count_admission(sequence)
            budget -= self._plan_chunk(plan, sequence, budget)

    def _prefix_hits(self, sequence: Sequence) -> list[int]:
        if not self._pool.prefix_caching:
            return []
        # The last token is always computed: its logits are what the next token is sampled from.
        full_blocks = (sequence.num_tokens - 1) // self._pool.block_size
        return self._pool.lookup(sequence.block_hashes(full_blocks, self._pool.block_size))

    def _count_admission(self, sequence: Sequence) -> None:
        self._queried_tokens += sequence.num_tokens
        self._cached_tokens += sequence.num_computed
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.num_computed
            self._prompt_tokens += sequence.prompt_length

    def _reserve_next(self, sequence: Sequence) -> bool:
        """Makes room for one more token; False when that took the sequence's own blocks."""
        if sequence.num_computed < len(sequence.block_table) * self._pool.block_size:
            return True
        while self._pool.num_free == 0:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_table += self._pool.allocate(1)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self._running.pop()
        self._preemptions += 1
        self._recomputed_tokens += victim.num_computed
        self._release(victim)
        victim.num_computed = 0
        # It is older than everything that waits, because admission is in order of arrival.
        self._waiting[victim.key] = victim
        self._waiting.move_to_end(victim.key, last=False)

    def _release(self, sequence: Sequence) -> None:
        self._pool.release(sequence.block_table)
        sequence.block_table = []

    def _index_full_blocks(self, sequence: Sequence, start: int) -> None:
        size = self._pool.block_size
        first, end = start // size, sequence.num_computed // size
        if first < end:
            hashes = sequence.block_hashes(end, size)
            for number in range(first, end):
                self._pool.index(sequence.block_table[number], hashes[number])
