"""Which tokens run in the next step: plan() decides, commit() applies what the step sampled.

Decides and does nothing else: no tensors, no I/O, no clock.  Sequences are ordered by priority, then by arrival; the
first that runs is never preempted, so of one priority everything that is admitted finishes.  The samples of one
prompt arrive as one sequence with forks: its prompt is computed once, and then each fork goes on in the same blocks, of
which it copies the last before it writes there.
"""

from bisect import insort
from collections.abc import Hashable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from operator import attrgetter

from server.engine.blocks import BlockPool
from server.engine.messages import EngineStats
from server.engine.sequence import Sequence

_rank = attrgetter("rank")


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """The part of a step that belongs to one sequence.

    Attributes:
        sequence: whose tokens.
        start: position of the first token to compute.
        count: how many tokens from there.
        samples: the sequences that get their next token from the last of them: none for a chunk that ends inside the
            prompt, several where forks begin.
        report_from: the first position whose state is to be reported; end where there is none.
    """

    sequence: Sequence
    start: int
    count: int
    samples: tuple[Sequence, ...]
    report_from: int

    @property
    def end(self) -> int:
        """The position after the last token to compute."""
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: sequences that decode come first, then prompt chunks.

    Attributes:
        scheduled: what is computed.
        copies: (from, to) blocks to copy before that, because a sequence writes into what others read.
    """

    scheduled: list[ScheduledSequence] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens the step computes."""
        return sum(item.count for item in self.scheduled)


@dataclass(frozen=True, slots=True)
class Advance:
    """A sequence that a step has brought on.

    Attributes:
        sequence: it.
        token: its new token; None for one that ended with its prompt.
        row: the token's place among all that the step sampled.
    """

    sequence: Sequence
    token: int | None
    row: int


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
        # By rank, like those that run.
        self._waiting: list[Sequence] = []
        self._arrivals = 0
        self._running: list[Sequence] = []
        # Forks of running sequences whose prompts are not computed yet.  Each will run, so it counts as running.
        self._pending_forks = 0
        self._by_key: dict[Hashable, Sequence] = {}
        # Full blocks that running sequences are about to compute, by their hashes.
        self._promised: dict[bytes, Sequence] = {}
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
        """Sequences without blocks, each fork counted."""
        return len(self._by_key) - self.num_running

    @property
    def num_running(self) -> int:
        """Sequences with blocks, and the forks that will share theirs."""
        return len(self._running) + self._pending_forks

    def stats(self) -> EngineStats:
        """Levels and totals, for metrics."""
        return EngineStats(
            running=self.num_running,
            waiting=self.num_waiting,
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

    def check(self, sequence: Sequence) -> None:
        """Makes sure that a sequence, with its forks, can be added.

        Raises:
            ValueError: it is empty, could outgrow max_model_len, has forks but no new tokens, or its key or a fork's
                is in use.
        """
        if sequence.prompt_length < 1 or sequence.max_tokens < 0:
            raise ValueError(
                f"a sequence needs a prompt, not {sequence.prompt_length} prompt tokens "
                f"and {sequence.max_tokens} new ones"
            )
        if sequence.prompt_length + sequence.max_tokens > self._max_model_len:
            raise ValueError(
                f"{sequence.prompt_length} prompt tokens and {sequence.max_tokens} new ones "
                f"are more than the {self._max_model_len} that a sequence may have"
            )
        if sequence.forks and sequence.max_tokens == 0:
            raise ValueError(f"{len(sequence.family)} samples of no new tokens are not to be told apart")
        keys: set[Hashable] = set()
        for own in sequence.family:
            if own.key in self._by_key or own.key in keys:
                raise ValueError(f"sequence {own.key!r} exists already")
            keys.add(own.key)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence, with its forks, behind all of its priority that came before it.

        Raises:
            ValueError: as `check` does.
        """
        self.check(sequence)
        for own in sequence.family:
            self._by_key[own.key] = own
            own.arrival = self._arrivals
        self._arrivals += 1
        self._queue(sequence)

    def abort(self, key: Hashable) -> None:
        """Ends a sequence at once; its blocks are free when this returns.  Unknown keys are ignored.

        Its forks live on: the first of them takes its place.
        """
        sequence = self._by_key.pop(key, None)
        if sequence is None:
            return
        sequence.finish_reason = "abort"
        if sequence.leader is not None:
            sequence.leader.forks.remove(sequence)
            if sequence.leader.block_table:
                self._pending_forks -= 1
        elif sequence.forks:
            self._replace(sequence, sequence.forks.pop(0))
        elif not sequence.block_table:
            self._waiting.remove(sequence)
        else:
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

    def commit(self, plan: StepPlan, sampled: Ids[int]) -> list[Advance]:
        """Applies a finished step.

        Args:
            plan: what ran.
            sampled: one token for each of the plan's samples, in their order.

        Returns:
            Each sequence that got a token or ended.  Those that are `finished` hold no blocks any more.  Sequences
            aborted since the plan was made are left out.

        Raises:
            ValueError: there are fewer or more tokens than samples.
        """
        wanted = sum(len(item.samples) for item in plan.scheduled)
        if len(sampled) != wanted:
            raise ValueError(f"the step sampled {len(sampled)} tokens for {wanted} sequences")
        self._steps += 1
        advanced: list[Advance] = []
        row = 0
        for item in plan.scheduled:
            self._commit_computed(item)
            for sequence in item.samples:
                if not sequence.finished:
                    self._generated_tokens += 1
                    sequence.append(sampled[row])
                    advanced.append(Advance(sequence, sampled[row], row))
                row += 1
            sequence = item.sequence
            if sequence.max_tokens == 0 and item.end == sequence.prompt_length and not sequence.finished:
                sequence.finish_reason = "length"
                advanced.append(Advance(sequence, None, row))
        ended = [advance.sequence for advance in advanced if advance.sequence.finished]
        for sequence in ended:
            del self._by_key[sequence.key]
            self._release(sequence)
        if ended:
            self._running = [sequence for sequence in self._running if not sequence.finished]
        return advanced

    def _commit_computed(self, item: ScheduledSequence) -> None:
        sequence, holder = item.sequence, None
        if sequence.finish_reason is None:
            holder = sequence
            sequence.num_computed = item.end
            if sequence.num_reported < sequence.prompt_length:
                sequence.num_reported = max(sequence.num_reported, min(item.end, sequence.prompt_length))
        else:
            # Of an aborted sequence the blocks may live on in its forks.
            holder = next((own for own in item.samples if not own.finished), None)
        if holder is not None and self._pool.prefix_caching:
            self._index_full_blocks(holder, item.start)

    def _plan_decodes(self, plan: StepPlan) -> int:
        # Victims are taken from the end of the list and this loop starts at its beginning, so none is scheduled yet.
        position = 0
        while position < len(self._running):
            sequence = self._running[position]
            if sequence.num_uncomputed == 1 and self._reserve_next(plan, sequence):
                self._schedule(plan, sequence, 1)
            position += 1
        return len(plan.scheduled)

    def _plan_chunks(self, plan: StepPlan, budget: int) -> int:
        used = 0
        for sequence in list(self._running):
            if used == budget:
                break
            if sequence.num_uncomputed > 1:
                used += self._plan_chunk(plan, sequence, budget - used)
        return used

    def _plan_chunk(self, plan: StepPlan, sequence: Sequence, budget: int) -> int:
        count = min(sequence.num_uncomputed, budget)
        self._schedule(plan, sequence, count)
        return count

    def _schedule(self, plan: StepPlan, sequence: Sequence, count: int) -> None:
        start = sequence.num_computed
        end = start + count
        samples: tuple[Sequence, ...] = ()
        if end == sequence.num_tokens and sequence.max_tokens > 0:
            samples = (sequence, *self._begin_forks(sequence, end)) if sequence.forks else (sequence,)
        report_from = sequence.num_reported
        if report_from >= end or report_from == sequence.prompt_length:
            report_from = end
        plan.scheduled.append(ScheduledSequence(sequence, start, count, samples, report_from))

    def _begin_forks(self, sequence: Sequence, end: int) -> list[Sequence]:
        """Makes a sequence's forks run beside it, in its blocks, as if their prompt were computed up to `end`."""
        forks = sequence.forks
        place = self._running.index(sequence) + 1
        self._running[place:place] = forks
        self._pending_forks -= len(forks)
        for fork in forks:
            self._pool.share(sequence.block_table)
            fork.leader = None
            fork.block_table = list(sequence.block_table)
            fork.continue_from(sequence)
            fork.num_computed = end
        sequence.forks = []
        return forks

    def _admit(self, plan: StepPlan, budget: int) -> None:
        while self._waiting and budget > 0 and self.num_running < self._max_num_seqs:
            sequence = self._waiting[0]
            hashes = self._reusable_hashes(sequence)
            hits = self._pool.lookup(hashes)
            if len(hits) < len(hashes) and hashes[len(hits)] in self._promised:
                return  # a prefix is computed once, though several that have it arrive together
            needed = self._pool.blocks_for(sequence.num_tokens) - len(hits)
            available = self._pool.num_free - sum(map(self._pool.is_free, hits))
            # Each running sequence may soon want one more block; without that headroom a sequence that was just
            # preempted would come straight back, only to be preempted again.
            headroom = available - needed - self.num_running
            if headroom < 0:
                return
            del self._waiting[0]
            self._split(sequence, min(headroom, self._max_num_seqs - self.num_running - 1))
            self._pool.share(hits)
            sequence.block_table = hits + self._pool.allocate(needed)
            sequence.num_computed = len(hits) * self._pool.block_size
            insort(self._running, sequence, key=_rank)
            self._promise(sequence, len(hits))
            self._pending_forks += len(sequence.forks)
            self._count_admission(sequence)
            budget -= self._plan_chunk(plan, sequence, budget)

    def _split(self, sequence: Sequence, most_forks: int) -> None:
        """Leaves a sequence so many forks; the others wait, and one of them leads them."""
        rest = sequence.forks[most_forks:]
        if not rest:
            return
        del sequence.forks[most_forks:]
        first, *others = rest
        first.leader = None
        first.forks = others
        first.cached_tokens = 0  # their prompt is counted already
        for fork in others:
            fork.leader = first
        self._queue(first)

    def _replace(self, sequence: Sequence, heir: Sequence) -> None:
        """Puts a fork in the place of its leader."""
        self._take_back(sequence, heir)
        sequence.hand_over(heir)
        if heir.block_table:
            self._running[self._running.index(sequence)] = heir
            self._pending_forks -= 1
        else:
            self._waiting[self._waiting.index(sequence)] = heir

    def _reusable_hashes(self, sequence: Sequence) -> Ids[bytes]:
        """The hashes of the blocks that it would take from the prefix cache, if they were there."""
        if not self._pool.prefix_caching:
            return []
        # The last token is always computed: its logits are what the next token is sampled from.  So are tokens whose
        # states are still to be reported: the cache does not hold those.
        reusable = sequence.num_tokens - 1
        if sequence.num_reported < sequence.prompt_length:
            reusable = sequence.num_reported
        return sequence.block_hashes(reusable // self._pool.block_size, self._pool.block_size)

    def _promise(self, sequence: Sequence, first: int) -> None:
        """Tells of the full blocks that a sequence will compute, from its block number `first` on."""
        if self._pool.prefix_caching:
            size = self._pool.block_size
            for block_hash in sequence.block_hashes(sequence.num_tokens // size, size)[first:]:
                self._promised.setdefault(block_hash, sequence)

    def _take_back(self, sequence: Sequence, heir: Sequence | None = None) -> None:
        """Nobody, or the heir, will compute what a sequence was about to."""
        if not self._promised:
            return
        size = self._pool.block_size
        for block_hash in sequence.block_hashes(sequence.num_tokens // size, size)[sequence.num_computed // size :]:
            if self._promised.get(block_hash) is sequence:
                if heir is None:
                    del self._promised[block_hash]
                else:
                    self._promised[block_hash] = heir

    def _count_admission(self, sequence: Sequence) -> None:
        self._queried_tokens += sequence.num_tokens
        self._cached_tokens += sequence.num_computed
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.num_computed
            self._prompt_tokens += sequence.prompt_length

    def _reserve_next(self, plan: StepPlan, sequence: Sequence) -> bool:
        """Makes room for one more token; False when that took the sequence's own blocks."""
        table, index = sequence.block_table, sequence.num_computed // self._pool.block_size
        while index == len(table) or self._pool.is_shared(table[index]):
            if self._pool.num_free == 0:
                victim = self._running[-1]
                self._preempt(victim)
                if victim is sequence:
                    return False
                continue  # perhaps it was the victim who shared the block
            (block,) = self._pool.allocate(1)
            if index == len(table):
                table.append(block)
            else:
                plan.copies.append((table[index], block))
                self._pool.release([table[index]])
                table[index] = block
        return True

    def _preempt(self, victim: Sequence) -> None:
        self._running.pop()
        self._pending_forks -= len(victim.forks)
        self._preemptions += 1
        self._recomputed_tokens += victim.num_computed
        self._release(victim)
        victim.num_computed = 0
        self._queue(victim)

    def _queue(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=_rank)

    def _release(self, sequence: Sequence) -> None:
        self._take_back(sequence)
        self._pool.release(sequence.block_table)
        sequence.block_table = []

    def _index_full_blocks(self, sequence: Sequence, start: int) -> None:
        size = self._pool.block_size
        first, end = start // size, sequence.num_computed // size
        if first < end:
            hashes = sequence.block_hashes(end, size)
            for number in range(first, end):
                self._pool.index(sequence.block_table[number], hashes[number])
                self._promised.pop(hashes[number], None)
