"""Which tokens run in the next step: plan() decides, commit() applies what the step sampled.

Decides and does nothing else: no tensors, no I/O, no clock.  Which sequences hold blocks, running.py decides.  The
oldest of them always advances and is never preempted, so everything finishes.  The samples of one prompt arrive as one
sequence with forks: its prompt is computed once, and then each fork goes on in the same blocks, of which it copies the
last before it writes there.
"""

from collections.abc import Hashable, Set
from collections.abc import Sequence as Ids
from dataclasses import replace
from math import inf

from persimmon.server.engine.admission import Admission
from persimmon.server.engine.block_tables import BlockTables
from persimmon.server.engine.blocks import BlockPool, salted_with_length
from persimmon.server.engine.chunks import share_chunks
from persimmon.server.engine.guesses import Guesses, Speculation
from persimmon.server.engine.messages import EngineStats
from persimmon.server.engine.running import RunningBatch
from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.shares import Holdings, Share
from persimmon.server.engine.short_steps import ShortSteps
from persimmon.server.engine.step_cost import StepCosts, StepWork
from persimmon.server.engine.step_plan import Advance, ScheduledSequence, StepPlan
from persimmon.server.engine.waiting import WaitingQueue

TYPICAL_OUTPUT = 512
"""Output tokens that a sequence is expected to get before any has finished."""


class Scheduler:
    """Continuous batching over a block pool.

    Args:
        pool: the KV blocks.
        max_num_seqs: maximum sequences that hold blocks at once.
        max_num_batched_tokens: token budget of a step, at least max_num_seqs, so that every running sequence advances.
        max_model_len: maximum tokens of one sequence; the pool holds at least one such sequence.
        typical_output: output tokens that a sequence may be expected to get, until some have finished.
        rope_limit: prompts longer than this have keys that depend on their length, so they share blocks only with
            prompts of the same length; None where there are none.
        speculation: how next tokens are guessed; None where none is.
        max_guess_rows: most tokens of a step with guesses, which then has no prompts; None where that is not limited.

    Raises:
        ValueError: the limits contradict each other.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        typical_output: int = TYPICAL_OUTPUT,
        rope_limit: int | None = None,
        speculation: Speculation | None = None,
        max_guess_rows: int | None = None,
    ) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {max_num_batched_tokens}, fewer than max_num_seqs, which is {max_num_seqs}"
            )
        if pool.blocks_for(max_model_len) > pool.num_blocks:
            raise ValueError(
                f"one sequence of {max_model_len} tokens needs {pool.blocks_for(max_model_len)} blocks, "
                f"the pool has {pool.num_blocks}"
            )
        self._pool = pool
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._rope_limit = rope_limit
        self._guesses = Guesses(
            pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_rows=max_guess_rows,
            speculation=speculation,
        )
        self._admission = Admission(pool.num_blocks, pool.block_size, typical_output)
        self._tables = BlockTables(pool)
        self._waiting = WaitingQueue()
        self._running = RunningBatch(
            tables=self._tables,
            waiting=self._waiting,
            guesses=self._guesses,
            admission=self._admission,
            whole=Holdings(max_num_seqs, pool.num_blocks),
        )
        self._arrivals = 0
        self._by_key: dict[Hashable, Sequence] = {}
        # Planned and not committed, the older first.
        self._under_way: list[StepPlan] = []
        self._short_steps = ShortSteps()
        self._steps = 0
        self._generated_tokens = 0

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
        return len(self._running)

    def stats(self) -> EngineStats:
        """Levels and totals, for metrics."""
        return EngineStats(
            running=self.num_running,
            waiting=self.num_waiting,
            free_blocks=self._pool.num_free,
            total_blocks=self._pool.num_blocks,
            steps=self._steps,
            prompt_tokens=self._running.prompt_tokens,
            generated_tokens=self._generated_tokens,
            cached_tokens=self._running.cached_tokens,
            queried_tokens=self._running.queried_tokens,
            preemptions=self._running.preemptions,
            recomputed_tokens=self._running.recomputed_tokens,
            drafts=self._guesses.drafts,
            draft_tokens=self._guesses.draft_tokens,
            accepted_tokens=self._guesses.accepted_tokens,
        )

    def check(self, sequence: Sequence) -> None:
        """Makes sure that a sequence, with its forks, can be added.

        Raises:
            ValueError: as `Sequence.check` does, or its key or a fork's is in use.
        """
        sequence.check(self._max_model_len)
        keys: set[Hashable] = set()
        for own in sequence.family:
            if own.key in self._by_key or own.key in keys:
                raise ValueError(f"sequence {own.key!r} exists already")
            keys.add(own.key)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence, with its forks, behind all of its client's that have its priority and came before it.

        Raises:
            ValueError: as `check` does.
        """
        self.check(sequence)
        share = self._waiting.share_of(sequence.owner, sequence.weight)
        for own in sequence.family:
            self._by_key[own.key] = own
            own.arrival = self._arrivals
            own.share = share
            if self._rope_limit is not None and own.prompt_length > self._rope_limit:
                own.cache_salt = salted_with_length(own.cache_salt, own.prompt_length)
        self._arrivals += 1
        self._waiting.add(sequence)

    def abort(self, key: Hashable) -> None:
        """Ends a sequence at once.  Unknown keys are ignored.

        Its blocks are free when this returns, or when the last step under way that may write them has been committed.
        Its forks live on: the first of them takes its place.
        """
        sequence = self._by_key.pop(key, None)
        if sequence is None:
            return
        sequence.finish_reason = "abort"
        successor = self._running.abort(sequence)
        if successor is not None:
            # What running steps compute of the prompt belongs to the successor.
            for item in (item for plan in self._under_way for item in plan.scheduled):
                if item.sequence is sequence:
                    item.sequence = successor

    def plan(self, costs: StepCosts | None = None) -> StepPlan:
        """Fills one step: a token for each decoding sequence, then chunks of prompts.

        Reserves the blocks that the step writes, preempting sequences when there are too few; no step is under way.

        Args:
            costs: what a step costs, for chunks that leave those who decode their pace; without it they take what
                the token budget leaves.

        Raises:
            ValueError: a step is under way.
        """
        if self._under_way:
            raise ValueError("a step is running; use plan_ahead() to plan the next one")
        self._running.make_room()
        return self._fill_step(costs)

    def plan_ahead(self, costs: StepCosts | None = None) -> StepPlan | None:
        """Fills the step after the running one, whose tokens are not known yet.

        It may turn out to compute a token too many for a sequence that ends before it; that token is dropped.

        Args:
            costs: as for `plan`.

        Returns:
            None where that step must be known first: because a draw depends on its tokens, because it computes guesses
            or the next one may, or because a sequence must be preempted, which is not possible while a step may write
            its blocks.
        """
        if any(sequence.draws_from_output and sequence.num_pending for sequence in self._running.sequences):
            return None
        if any(step.num_guesses for step in self._under_way):
            return None
        if self._running.must_preempt:
            return None
        if self._guesses.enabled:
            decoding = self._running.decoding()
            if self._may_guess(decoding) and self._guesses.expected(decoding, costs):
                return None
        return self._fill_step(costs)

    def _fill_step(self, costs: StepCosts | None) -> StepPlan:
        if costs is None or not self._waiting.contended:
            return self._filled(costs)
        short = self._short_steps.next(self._running.sequences, self._waiting, costs)
        if short is not None:
            plan = self._filled(costs, short.clients, short.prompt_seconds)
            # Without anything scheduled, those that wait find no room, or last tokens are being computed.
            if plan.scheduled:
                plan.short = True
                self._short_steps.count_short(costs.seconds(plan.work))
                return plan
        plan = self._filled(costs, max_seconds=costs.shared_seconds)
        self._short_steps.count_full(costs.seconds(plan.work), costs.longest)
        return plan

    def _filled(self, costs: StepCosts | None, clients: Set[Share] | None = None, max_seconds: float = inf) -> StepPlan:
        """A step.

        Args:
            costs: as for `plan`.
            clients: whose sequences advance; None for all clients'.
            max_seconds: time for prompts.
        """
        plan = StepPlan()
        self._plan_decodes(plan, costs, clients)
        self._running.admit(clients)
        self._plan_chunks(plan, costs, clients, max_seconds)
        if plan.scheduled:
            self._under_way.append(plan)
        return plan

    def commit(self, plan: StepPlan, drawn: Ids[list[int]]) -> list[Advance]:
        """Applies a finished step, the oldest under way.

        Args:
            plan: what ran.
            drawn: for each of the plan's samples, in their order, a token for each of its draws; those after guesses
                that cannot be right may be missing.

        Returns:
            Each sequence that got a token or ended.  Sequences that ended since the plan was made are left out.

        Raises:
            ValueError: there are tokens for fewer or more sequences than the plan has samples.
        """
        if len(drawn) != plan.num_samples:
            raise ValueError(f"the step has tokens for {len(drawn)} sequences, the plan draws for {plan.num_samples}")
        self._steps += 1
        self._admission.step(plan.work.decodes + plan.work.chunk_tokens, plan.short)
        advanced: list[Advance] = []
        row = 0
        for item in plan.scheduled:
            if item.guesses:
                if not item.sequence.finished:
                    advanced.append(Advance(item.sequence, self._commit_guesses(item, drawn[row]), row))
                row += 1
                continue
            self._commit_computed(item)
            for sequence in item.samples:
                if sequence.finish_reason is None:
                    sequence.num_pending -= 1
                    sequence.append(drawn[row][0])
                    advanced.append(Advance(sequence, drawn[row], row))
                row += 1
            sequence = item.sequence
            if sequence.max_tokens == 0 and item.end == sequence.prompt_length and not sequence.finished:
                sequence.finish_reason = "length"
                advanced.append(Advance(sequence, [], row))
        self._generated_tokens += sum([len(advance.tokens) for advance in advanced])
        if self._waiting.contended:
            for advance in advanced:
                advance.sequence.share.charge(max(1, len(advance.tokens)))
        ended = [advance.sequence for advance in advanced if advance.sequence.finish_reason is not None]
        for sequence in ended:
            if sequence.max_tokens > 0:
                self._admission.end(sequence.num_output_tokens)
            del self._by_key[sequence.key]
        if ended:
            self._running.end(ended)
        self._leave(plan)
        return advanced

    def fail(self, plan: StepPlan) -> list[Sequence]:
        """Ends the sequences of a step that came to nothing, the oldest under way, and their forks.

        Returns:
            Those that it ended.
        """
        concerned: dict[Sequence, None] = {}
        for step in self._under_way:
            for item in step.scheduled:
                # Forks that a later step began rest on the same blocks.
                if step is plan or item.sequence in concerned:
                    concerned |= dict.fromkeys((*item.sequence.family, *item.samples))
        ended = [sequence for sequence in concerned if not sequence.finished]
        # Forks first: one whose leader has gone would take its place.
        for sequence in reversed(ended):
            self.abort(sequence.key)
        self._leave(plan)
        return ended

    def _leave(self, plan: StepPlan) -> None:
        """A step is no longer under way: what it might have written is free where its sequence has ended."""
        if plan.scheduled:
            self._under_way.remove(plan)
        for item in plan.scheduled:
            for sequence in item.members:
                sequence.steps_under_way -= 1
                if sequence.finish_reason is not None and sequence.steps_under_way == 0:
                    self._tables.release(sequence)

    def _commit_computed(self, item: ScheduledSequence) -> None:
        holder: Sequence | None = item.sequence
        if item.sequence.finish_reason is not None:
            # Of an aborted sequence the blocks may live on in its forks.
            holder = next((own for own in item.samples if not own.finished), None)
        if holder is not None:
            self._tables.index_full(holder, item.start, item.end)

    def _commit_guesses(self, item: ScheduledSequence, drawn: list[int]) -> list[int]:
        """Applies what was drawn at guesses; the tokens that count."""
        sequence = item.sequence
        sequence.num_pending -= item.draws
        taken = self._guesses.commit(item, drawn)
        self._tables.index_full(sequence, item.start, sequence.num_computed)
        return taken

    def _may_guess(self, decoding: Ids[Sequence]) -> bool:
        """Whether the next step may have guesses; where their number is limited, only if it computes no prompt."""
        if all(sequence.proposer is None for sequence in decoding):
            return False
        if self._guesses.max_rows is None:
            return True
        if self._running.pending_forks or self._running.may_grow:
            return False
        return not any(own.num_pending == 0 and own.num_uncomputed > 1 for own in self._running.sequences)

    def _plan_decodes(self, plan: StepPlan, costs: StepCosts | None, clients: Set[Share] | None) -> None:
        decoding = self._running.decoding(clients)
        self._tables.reserve_next(decoding, plan.copies)
        if self._may_guess(decoding):
            chosen = self._guesses.plan(plan, decoding, len(self._running.sequences), costs)
            for sequence, guesses in zip(decoding, chosen, strict=True):
                self._schedule(plan, sequence, 1 + len(guesses), guesses)
        else:
            for sequence in decoding:
                self._schedule(plan, sequence, 1)
        context = sum([item.start for item in plan.scheduled])
        plan.work = StepWork(
            decodes=len(plan.scheduled),
            decode_context=context,
            guess_tokens=plan.num_guesses,
            guess_context=sum([item.start * len(item.guesses) for item in plan.scheduled]) if plan.num_guesses else 0,
        )

    def _plan_chunks(
        self, plan: StepPlan, costs: StepCosts | None, clients: Set[Share] | None, max_seconds: float
    ) -> None:
        """Shares what decodes leave of a step among the prompts that run."""
        prompts = self._running.prompts(clients)
        if not prompts:
            return
        work = plan.work
        tokens = self._max_num_batched_tokens - work.decodes - plan.num_guesses
        if clients is not None and costs is not None:
            tokens = int(min(tokens, costs.most_tokens))  # others decode, though not in this step
        chunk_tokens, chunk_context, chunk_reach = 0, 0, 0
        for sequence, count in share_chunks(prompts, tokens, work, costs, max_seconds).items():
            chunk_tokens += count
            chunk_reach += sequence.num_computed
            chunk_context += count * sequence.num_computed + count * (count + 1) // 2
            self._schedule(plan, sequence, count)
        plan.work = replace(work, chunk_tokens=chunk_tokens, chunk_context=chunk_context, chunk_reach=chunk_reach)

    def _schedule(self, plan: StepPlan, sequence: Sequence, count: int, guesses: Ids[int] = ()) -> None:
        start = sequence.num_computed
        end = start + count
        item = ScheduledSequence(sequence, start, count)
        if start >= len(sequence.token_ids):
            item.pending_row = sequence.row
        draws = 1
        if guesses:
            item.guesses = guesses
            draws = item.draws
        samples: tuple[Sequence, ...] = ()
        if guesses or (count == sequence.num_uncomputed and sequence.max_tokens > 0):
            samples = (sequence, *self._running.begin_forks(sequence, end)) if sequence.forks else (sequence,)
            item.samples = samples
        if sequence.num_reported < sequence.prompt_length:
            if sequence.num_reported < end:
                item.report_from = sequence.num_reported
            sequence.num_reported = max(sequence.num_reported, min(end, sequence.prompt_length))
        sequence.num_computed = end
        for own in samples or (sequence,):
            own.steps_under_way += 1
        for own in samples:
            own.num_pending += draws
            own.row = plan.num_samples
            plan.num_samples += 1
        plan.scheduled.append(item)
