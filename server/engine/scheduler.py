"""Which tokens run in the next step: plan() decides, commit() applies what the step sampled.

Decides and does nothing else: no tensors, no I/O, no clock.  The oldest sequence that runs always advances and is never
preempted, so everything finishes.  The samples of one prompt arrive as one sequence with forks: its prompt is computed
once, and then each fork goes on in the same blocks, of which it copies the last before it writes there.
"""

from bisect import insort
from collections import Counter
from collections.abc import Hashable, Set
from collections.abc import Sequence as Ids
from dataclasses import replace
from itertools import islice
from math import inf
from operator import attrgetter

from persimmon.server.engine.admission import Admission, Growing
from persimmon.server.engine.blocks import BlockPool, salted_with_length
from persimmon.server.engine.chunks import share_chunks
from persimmon.server.engine.guesses import Guesses, Speculation
from persimmon.server.engine.messages import EngineStats
from persimmon.server.engine.preemption import lost_least, owed_to
from persimmon.server.engine.promises import Promises
from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.shares import Holdings, Share
from persimmon.server.engine.short_steps import ShortSteps, clients_with_little
from persimmon.server.engine.step_cost import StepCosts, StepWork
from persimmon.server.engine.step_plan import Advance, ScheduledSequence, StepPlan
from persimmon.server.engine.waiting import WaitingQueue

_rank = attrgetter("rank")

TYPICAL_OUTPUT = 512
"""Output tokens that a sequence is expected to get before any has finished."""

MAX_OVERTAKEN = 8
"""Maximum number of waiting sequences, waiting for a prefix that is being computed, that others may overtake."""


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
        self._max_num_seqs = max_num_seqs
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
        self._waiting = WaitingQueue()
        self._arrivals = 0
        # By rank.
        self._running: list[Sequence] = []
        # Forks of running sequences whose prompts are not computed yet.  Each will run, so it counts as running.
        self._pending_forks = 0
        self._by_key: dict[Hashable, Sequence] = {}
        self._promised = Promises(pool.block_size)
        # Planned and not committed, the older first.
        self._under_way: list[StepPlan] = []
        self._whole = Holdings(max_num_seqs, pool.num_blocks)
        self._short_steps = ShortSteps()
        self._admission = Admission(pool.num_blocks, pool.block_size, typical_output)
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
            drafts=self._guesses.drafts,
            draft_tokens=self._guesses.draft_tokens,
            accepted_tokens=self._guesses.accepted_tokens,
        )

    def check(self, sequence: Sequence) -> None:
        """Makes sure that a sequence, with its forks, can be added.

        Raises:
            ValueError: it is empty, could outgrow max_model_len, has forks but no new tokens, has spans that are out of
                order or not within its prompt, or its key or a fork's is in use.
        """
        if sequence.prompt_length < 1 or sequence.max_tokens < 0:
            raise ValueError(
                f"{sequence.prompt_length} prompt tokens and {sequence.max_tokens} new ones; expected at least one "
                f"prompt token"
            )
        if sequence.prompt_length + sequence.max_tokens > self._max_model_len:
            raise ValueError(
                f"{sequence.prompt_length} prompt tokens and {sequence.max_tokens} new ones "
                f"exceed the maximum length of a sequence, {self._max_model_len}"
            )
        if sequence.forks and sequence.max_tokens == 0:
            raise ValueError(f"{len(sequence.family)} samples with no new tokens; only one is allowed")
        begin = 0
        for span in sequence.spans:
            if span.start < begin or span.length < 1 or span.start + span.length > sequence.prompt_length:
                raise ValueError(
                    f"a span of {span.length} tokens from {span.start} on must hold a token, begin at {begin} or later "
                    f"and end within the {sequence.prompt_length} tokens of the prompt"
                )
            begin = span.start + span.length
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
            self._retire(sequence)

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
        while self._missing_blocks() > 0:
            self._preempt(lost_least(self._running))
        yielding = self._yielding()
        if yielding is not None:
            self._preempt(yielding)
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
        if any(sequence.draws_from_output and sequence.num_pending for sequence in self._running):
            return None
        if any(step.num_guesses for step in self._under_way):
            return None
        if self._missing_blocks() > 0 or self._yielding() is not None:
            return None
        if self._guesses.enabled:
            decoding = self._decoding()
            if self._may_guess(decoding) and self._guesses.expected(decoding, costs):
                return None
        return self._fill_step(costs)

    def _fill_step(self, costs: StepCosts | None) -> StepPlan:
        if costs is None or not self._waiting.contended:
            return self._filled(costs)
        plan = self._short_step(costs)
        if plan is None:
            plan = self._filled(costs, max_seconds=costs.shared_seconds)
            self._short_steps.count_full(costs.seconds(plan.work), costs.longest)
        return plan

    def _short_step(self, costs: StepCosts) -> StepPlan | None:
        """A step for clients with little work; None where the next step is for all."""
        seconds = self._short_steps.seconds
        if seconds <= costs.step or not self._waiting:
            return None
        clients = clients_with_little(self._running, self._waiting.counts)
        own = [sequence for sequence in self._running if sequence.share in clients]
        joins = next(self._waiting.in_order()).share in clients
        quiet = costs.step + sum([costs.decode + costs.decode_context * one.num_computed for one in own])
        if not (own or joins) or seconds <= quiet:
            return None
        plan = self._filled(costs, clients, seconds - quiet - costs.chunks)
        if not plan.scheduled:
            return None  # those that wait find no room, or last tokens are being computed
        plan.short = True
        self._short_steps.count_short(costs.seconds(plan.work))
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
        self._admit(clients)
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
            self._retire(sequence)
        if ended:
            self._running = [sequence for sequence in self._running if not sequence.finished]
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
                    self._pool.release(sequence.block_table)
                    sequence.block_table = []

    def _commit_computed(self, item: ScheduledSequence) -> None:
        holder: Sequence | None = item.sequence
        if item.sequence.finish_reason is not None:
            # Of an aborted sequence the blocks may live on in its forks.
            holder = next((own for own in item.samples if not own.finished), None)
        if holder is not None and self._pool.prefix_caching:
            self._index_full_blocks(holder, item.start, item.end)

    def _commit_guesses(self, item: ScheduledSequence, drawn: list[int]) -> list[int]:
        """Applies what was drawn at guesses; the tokens that count."""
        sequence = item.sequence
        sequence.num_pending -= item.draws
        taken = self._guesses.commit(item, drawn)
        if self._pool.prefix_caching:
            self._index_full_blocks(sequence, item.start, sequence.num_computed)
        return taken

    def _missing_blocks(self) -> int:
        """How many blocks more than there are free ones the next tokens of all that decode need."""
        free = self._pool.num_free
        if free >= len(self._running):
            return 0
        size, needed = self._pool.block_size, 0
        writers: Counter[int] = Counter()
        for sequence in self._running:
            if sequence.num_uncomputed == 1 and not sequence.awaits_its_last_token:
                index = sequence.num_computed // size
                if index == len(sequence.block_table):
                    needed += 1
                else:
                    writers[sequence.block_table[index]] += 1
        # A sequence that writes into a block that others hold copies it, until only the last holder is left.
        needed += sum(min(count, self._pool.references(block) - 1) for block, count in writers.items())
        return needed - free

    def _decoding(self, clients: Set[Share] | None = None) -> list[Sequence]:
        """The sequences of all clients, or of some, that get a token in the next step."""
        return [
            sequence
            for sequence in self._running
            if sequence.num_uncomputed == 1
            and not sequence.awaits_its_last_token
            and (clients is None or sequence.share in clients)
        ]

    def _may_guess(self, decoding: Ids[Sequence]) -> bool:
        """Whether the next step may have guesses; where their number is limited, only if it computes no prompt."""
        if all(sequence.proposer is None for sequence in decoding):
            return False
        if self._guesses.max_rows is None:
            return True
        if self._pending_forks or (self._waiting and self.num_running < self._max_num_seqs):
            return False
        return not any(sequence.num_pending == 0 and sequence.num_uncomputed > 1 for sequence in self._running)

    def _plan_decodes(self, plan: StepPlan, costs: StepCosts | None, clients: Set[Share] | None) -> None:
        decoding = self._decoding(clients)
        for sequence in decoding:
            self._reserve_next(plan, sequence)
        if self._may_guess(decoding):
            chosen = self._guesses.plan(plan, decoding, len(self._running), costs)
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
        prompts = [own for own in self._running if own.num_pending == 0 and own.num_uncomputed > 0]
        if clients is not None:
            prompts = [own for own in prompts if own.share in clients]
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
            samples = (sequence, *self._begin_forks(sequence, end)) if sequence.forks else (sequence,)
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

    def _begin_forks(self, sequence: Sequence, end: int) -> list[Sequence]:
        """Makes a sequence's forks run with it, in its blocks, as if their prompt were computed up to `end`."""
        forks = sequence.forks
        place = self._running.index(sequence) + 1
        self._running[place:place] = forks
        self._pending_forks -= len(forks)
        for fork in forks:
            self._pool.share(sequence.block_table)
            self._guesses.begin(fork)
            fork.leader = None
            fork.block_table = list(sequence.block_table)
            fork.continue_from(sequence)
            fork.num_computed = end
        sequence.forks = []
        return forks

    def _admit(self, clients: Set[Share] | None) -> None:
        """Gives blocks to those that wait, in their order, as long as there are enough for all to grow.

        Args:
            clients: whose sequences may begin, as long as a block is left for each that runs; None for all clients'.
        """
        running: list[Growing] | None = None
        while self._waiting and self.num_running < self._max_num_seqs:
            found = self._next_waiting()
            if found is None:
                return
            sequence, hits = found
            needed, left = self._blocks_of(sequence, hits)
            if clients is not None and (sequence.share not in clients or left < len(self._running)):
                return
            if running is None:
                running = [own for other in self._running for own in [self._growing(other)] * (1 + len(other.forks))]
            newcomer = self._growing(sequence)
            most = min(1 + len(sequence.forks), self._max_num_seqs - self.num_running)
            samples = self._admission.fits(running, newcomer, most, left)
            if samples == 0:
                if left < 0 or owed_to(sequence, needed, self._running, self._whole) is None:
                    return
                samples = 1  # if blocks run short later, clients that hold more than their share give theirs up
            self._begin(sequence, hits, needed, samples)
            running += [newcomer] * samples

    def _begin(self, sequence: Sequence, hits: Ids[int], needed: int, samples: int) -> None:
        """Makes a waiting sequence run.

        Args:
            sequence: which waits.
            hits: blocks that it finds in the prefix cache.
            needed: how many blocks it needs beyond them.
            samples: how many of its samples begin; the others go on waiting.
        """
        num_cached = len(hits) * self._pool.block_size
        self._waiting.admit(sequence, sequence.num_tokens - num_cached if sequence.cached_tokens is None else 0)
        self._split(sequence, samples - 1)
        self._pool.share(hits)
        sequence.block_table = [*hits, *self._pool.allocate(needed)]
        sequence.num_computed = num_cached
        insort(self._running, sequence, key=_rank)
        self._guesses.begin(sequence)
        if self._pool.prefix_caching:
            self._promised.make(sequence, len(hits))
        self._pending_forks += len(sequence.forks)
        self._count_admission(sequence)

    def _next_waiting(self) -> tuple[Sequence, Ids[int]] | None:
        """The sequence to be admitted next, with the blocks that it finds in the prefix cache.

        A prefix is computed once, though several that have it arrive together: those wait for it, and a few others may
        overtake them.
        """
        for sequence in islice(self._waiting.in_order(), MAX_OVERTAKEN + 1):
            hashes = self._reusable_hashes(sequence)
            hits = self._pool.lookup(hashes)
            if len(hits) == len(hashes) or hashes[len(hits)] not in self._promised:
                return sequence, hits
        return None

    def _yielding(self) -> Sequence | None:
        """The running sequence that gives way to another client's, which has less than its share.

        Only one in a step: what ends by itself in the meantime makes room too.
        """
        if not (self._waiting and self._waiting.contended):
            return None
        found = self._next_waiting()
        if found is None:
            return None
        newcomer, hits = found
        needed, left = self._blocks_of(newcomer, hits)
        if left >= 0 and self.num_running < self._max_num_seqs:
            return None
        return owed_to(newcomer, needed, self._running, self._whole)

    def _blocks_of(self, sequence: Sequence, hits: Ids[int]) -> tuple[int, int]:
        """How many new blocks a waiting sequence needs beyond its prefix hits, and how many are then left."""
        needed = self._pool.blocks_for(sequence.num_tokens) - len(hits)
        return needed, self._pool.num_free - sum(map(self._pool.is_free, hits)) - needed

    def _growing(self, sequence: Sequence) -> Growing:
        blocks = len(sequence.block_table) or self._pool.blocks_for(sequence.num_tokens)
        return self._admission.growing(sequence.prompt_length, sequence.num_output_tokens, sequence.max_tokens, blocks)

    def _split(self, sequence: Sequence, max_forks: int) -> None:
        """Leaves a sequence at most `max_forks` forks; the others wait, and one of them leads them."""
        rest = sequence.forks[max_forks:]
        if not rest:
            return
        del sequence.forks[max_forks:]
        first, *others = rest
        first.leader = None
        first.forks = others
        first.cached_tokens = 0  # their prompt is counted already
        for fork in others:
            fork.leader = first
        self._waiting.add(first)

    def _replace(self, sequence: Sequence, successor: Sequence) -> None:
        """Puts a fork in the place of its leader."""
        self._promised.withdraw(sequence, successor)
        sequence.hand_over(successor)
        if successor.block_table:
            self._running[self._running.index(sequence)] = successor
            self._guesses.begin(successor)
            self._pending_forks -= 1
            # What running steps compute of the prompt belongs to the successor.
            for item in (item for plan in self._under_way for item in plan.scheduled):
                if item.sequence is sequence:
                    item.sequence = successor
        else:
            self._waiting.replace(sequence, successor)

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

    def _count_admission(self, sequence: Sequence) -> None:
        self._queried_tokens += sequence.num_tokens
        self._cached_tokens += sequence.num_computed
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.num_computed
            self._prompt_tokens += sequence.prompt_length

    def _reserve_next(self, plan: StepPlan, sequence: Sequence) -> None:
        """Makes room for one more token."""
        table, index = sequence.block_table, sequence.num_computed // self._pool.block_size
        if index == len(table):
            table += self._pool.allocate(1)
        elif self._pool.is_shared(table[index]):
            (block,) = self._pool.allocate(1)
            plan.copies.append((table[index], block))
            self._pool.release([table[index]])
            table[index] = block

    def _preempt(self, victim: Sequence) -> None:
        self._running.remove(victim)
        self._pending_forks -= len(victim.forks)
        self._preemptions += 1
        self._recomputed_tokens += victim.num_computed
        self._admission.lose(victim.num_computed)
        self._retire(victim)
        victim.num_computed = 0
        self._waiting.add(victim)

    def _retire(self, sequence: Sequence) -> None:
        """Gives a sequence's blocks back, unless a step under way may write them: then its end does."""
        self._guesses.release(sequence)
        self._promised.withdraw(sequence)
        if sequence.steps_under_way == 0:
            self._pool.release(sequence.block_table)
            sequence.block_table = []

    def _index_full_blocks(self, sequence: Sequence, start: int, end: int) -> None:
        """Makes the blocks findable that became full from position `start` to `end`."""
        size = self._pool.block_size
        first, count = start // size, end // size
        if first < count:
            hashes = sequence.block_hashes(count, size)
            for number in range(first, count):
                self._pool.index(sequence.block_table[number], hashes[number])
                self._promised.keep(hashes[number])
