"""A scheduler driven step by step, with a model without numbers and every promise checked at every step."""

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable
from collections.abc import Sequence as Ids
from operator import attrgetter

from persimmon.model.sampling_params import SamplingParams
from persimmon.server.engine.blocks import BlockPool
from persimmon.server.engine.guesses import Speculation
from persimmon.server.engine.messages import EngineStats, Pooling
from persimmon.server.engine.scheduler import Scheduler
from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.shares import Holdings
from persimmon.server.engine.short_steps import MAX_SHORT_STEPS
from persimmon.server.engine.step_cost import StepCosts
from persimmon.server.engine.step_plan import Advance, ScheduledSequence, StepPlan
from tests.server.engine.expectations import ExpectedStats, expected_advances
from tests.server.engine.fake_model import VOCABULARY, FakeModel, OneProposal, Oracle, generate_alone, next_token
from tests.server.engine.preemptions import check_preemption, watch_preemptions

_rank = attrgetter("rank")
_age = attrgetter("age")


class Simulation:
    """A scheduler, its pool, a fake model, and a second account of what they should be doing.

    Sequences are keyed 0, 1, 2, ... in order of arrival.  Between `plan` and `commit` a step is under way; with overlap
    the next may be planned meanwhile.  With a typical output of one token too many are admitted, so that sequences are
    preempted.
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
        overlap: bool = False,
        typical_output: int = 1,
        max_guesses: int = 0,
        right_in_a_row: int = 0,
        adaptive: bool = False,
        speculation: Speculation | None = None,
        max_guess_rows: int | None = None,
    ) -> None:
        self.pool = BlockPool(num_blocks, block_size, prefix_caching=prefix_caching)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            typical_output=typical_output,
            speculation=(
                Speculation(lambda own: Oracle(own.sample_index, max_guesses, right_in_a_row), adaptive=adaptive)
                if max_guesses
                else speculation
            ),
            max_guess_rows=max_guess_rows,
        )
        self.max_model_len = max_model_len
        self.live: dict[int, Sequence] = {}
        self.finished: dict[int, Sequence] = {}
        self.arrivals = 0
        self.under_way: deque[StepPlan] = deque()
        self.costs: StepCosts | None = None
        self.aborts: Counter[str] = Counter()
        """How many sequences were aborted in which state."""
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_guess_rows = max_guess_rows
        self._model = FakeModel(num_blocks, block_size)
        self._overlap = overlap
        self._preemptions = watch_preemptions(self.scheduler)
        # Ended while steps were under way that may write their blocks.
        self._leaving: list[Sequence] = []
        self._started_before: list[Sequence] = []
        self._short_in_a_row = 0
        self._reported: Counter[Hashable] = Counter()
        self._expected = ExpectedStats(num_blocks)

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

    def guess(self, key: int, count: int, wrong_at: int | None = None) -> None:
        """Guesses what a live sequence gets next, wrongly at one place; nothing while a step draws its next token."""
        sequence = self.live.get(key)
        if sequence is None or sequence.num_pending:
            return
        known = list(sequence.token_ids)
        for place in range(count):
            right = next_token(known, sequence.sample_index)
            known.append(right if place != wrong_at else (right + 1) % VOCABULARY)
        sequence.proposer = OneProposal(sequence.num_tokens, known[sequence.num_tokens :])

    def add(
        self,
        prompt: Ids[int],
        max_tokens: int,
        stop_token_ids: Iterable[int] = (),
        *,
        samples: int = 1,
        pooling: Pooling | None = None,
        priority: int = 0,
        penalized: bool = False,
        owner: str = "",
        weight: int = 1,
    ) -> Sequence:
        """A prompt with `samples` samples, the first of which is returned; the keys of the others follow its own."""
        stops = frozenset(stop_token_ids)
        sampling = SamplingParams(presence_penalty=1.0 if penalized else 0.0)

        def sample(index: int, pooling: Pooling | None = None, forks: Iterable[Sequence] = ()) -> Sequence:
            return Sequence(
                key=self.arrivals + index,
                token_ids=list(prompt),
                max_tokens=max_tokens,
                stop_token_ids=stops,
                sampling=sampling,
                sample_index=index,
                pooling=pooling,
                forks=list(forks),
                priority=priority,
                owner=owner,
                weight=weight,
            )

        sequence = sample(0, pooling, [sample(index) for index in range(1, samples)])
        family = sequence.family
        self.scheduler.add(sequence)
        self._expected.add(range(self.arrivals, self.arrivals + samples))
        for own in family:
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
        assert sequence is None or sequence.finish_reason == "abort"
        if sequence is not None:
            self._leaving.append(sequence)
        self.check()

    @property
    def can_plan(self) -> bool:
        return len(self.under_way) < (2 if self._overlap else 1)

    def plan(self) -> StepPlan:
        """Plans a step that can be planned now."""
        plan = self.try_plan()
        assert plan is not None
        return plan

    def try_plan(self) -> StepPlan | None:
        """Plans a step and launches it; `commit` ends it.  None where the step under way must end before."""
        assert self.can_plan
        ahead = bool(self.under_way)
        before = {key: (own.num_computed, list(own.block_table)) for key, own in self.live.items()}
        decoding = [own for own in self.running if own.num_uncomputed == 1 and not own.awaits_its_last_token]
        missing = sum(map(self._needs_a_block, decoding)) - self.pool.num_free
        must_wait = any(own.draws_from_output and own.num_pending for own in self.running)
        must_wait |= any(item.guesses for plan in self.under_way for item in plan.scheduled)
        may_wait = any(own.proposer is not None for own in decoding)  # for tokens behind which guesses are expected
        self._preemptions.clear()
        plan = self.scheduler.plan_ahead(self.costs) if ahead else self.scheduler.plan(self.costs)
        if plan is None:
            several_clients = len({own.owner for own in self.live.values()}) > 1
            assert missing > 0 or must_wait or may_wait or (several_clients and self.waiting)
            self.check()
            return None
        assert not (ahead and must_wait)
        preemptions = list(self._preemptions)
        preempted = [each.victim for each in preemptions]
        self._expected.count_plan(self.live, before, plan, preempted)
        assert not (preempted and ahead), "a sequence was preempted while a step was under way"
        assert missing > 0 or not any(each.for_blocks for each in preemptions), "there were enough blocks"
        assert sum(not each.for_blocks for each in preemptions) <= 1
        done_before = {own: before[key][0] for key, own in self.live.items()}
        for each in preemptions:
            check_preemption(each, done_before, self.live.values(), Holdings(self._max_num_seqs, self.pool.num_blocks))
        self._check_plan(plan, [sequence for sequence in decoding if sequence not in preempted], ahead=ahead)
        if plan.scheduled:
            self._model.launch(plan)
            self.under_way.append(plan)
        self.check()
        return plan

    def fail(self) -> None:
        """The oldest step under way comes to nothing."""
        plan = self.under_way.popleft()
        self._model.fail()
        concerned = {own for item in plan.scheduled for own in (*item.sequence.family, *item.samples)}
        later = [item for step in self.under_way for item in step.scheduled if item.sequence in concerned]
        concerned |= {own for item in later for own in item.samples}
        ended = self.scheduler.fail(plan)
        assert set(ended) == {own for own in self.live.values() if own in concerned}
        assert all(own.finish_reason == "abort" for own in ended)
        self._leaving += ended
        self.live = {key: own for key, own in self.live.items() if own not in ended}
        self.check()

    def commit(self) -> list[Advance]:
        """Computes the oldest step under way and ends it."""
        plan = self.under_way.popleft()
        drawn = self._model.wait()
        expected = expected_advances(plan, drawn)
        advanced = self.scheduler.commit(plan, drawn)
        assert advanced == expected
        self._expected.count_step(plan, advanced)
        for advance in advanced:
            sequence = advance.sequence
            assert sequence.token_ids[sequence.num_tokens - len(advance.tokens) :] == list(advance.tokens)
        for advance in advanced:
            if advance.sequence.finished:
                self._check_finished(advance.sequence)
        self.check()
        return advanced

    def step(self) -> StepPlan:
        """One turn of the engine: the step that it launched."""
        plan = self.try_plan()
        if plan is None:
            self.commit()
            plan = self.plan()
        while len(self.under_way) > (1 if self._overlap and plan.scheduled else 0):
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
        """Runs until all have finished, which takes no more than a few times the steps that they have tokens."""
        while self.under_way:
            self.commit()
        for _ in range(self._steps_left()):
            if self.live:
                self.step()
        while self.under_way:
            self.commit()
        assert not self.live, f"sequences {list(self.live)} never finished"
        assert not self.scheduler.has_work
        assert self.pool.num_free == self.pool.num_blocks
        assert not self.scheduler._tables._promises

    def check(self) -> None:
        """What holds at any moment."""
        self._leaving = [sequence for sequence in self._leaving if sequence.block_table]
        held = {own for plan in self.under_way for item in plan.scheduled for own in item.members}
        assert all(sequence in held for sequence in self._leaving), "blocks are held for a step that is not under way"
        everyone = [*self.live.values(), *self._leaving]
        references = Counter(block for sequence in everyone for block in sequence.block_table)
        assert all(references[block] for block in self._model.blocks_to_write()), "a step under way writes a free block"
        for block in range(self.pool.num_blocks):
            assert self.pool._references[block] == references[block], f"references of block {block}"
            assert self.pool.is_free(block) == (references[block] == 0)
        started, waiting = self.started, self.waiting
        assert len(started) == self.scheduler.num_running <= self._max_num_seqs
        assert len(waiting) == self.scheduler.num_waiting
        assert self.scheduler.has_work == bool(self.live)
        assert all(sequence.num_computed == 0 for sequence in waiting)
        if not self.pool.prefix_caching:
            # Of each client and priority newcomers begin in the order of arrival, and none before those who lost their
            # blocks.  (With prefix caching those who wait for a prefix that is being computed are overtaken.)
            for kind in {(sequence.owner, sequence.priority) for sequence in self.live.values()}:
                of_it = [own for own in self.live.values() if (own.owner, own.priority) == kind]
                waits = [own for own in of_it if own in waiting]
                new = [own for own in started if own in of_it and own not in self._started_before]
                assert not waits or all(own.rank < waits[0].rank for own in new)
        self._started_before = started
        self._expected.set_levels(
            running=len(started), waiting=len(waiting), free_blocks=self.pool.num_blocks - len(references)
        )
        assert self.stats == self._expected.stats

    def _steps_left(self) -> int:
        # Each step computes at least a token of the oldest that runs, which is never preempted.  What it has computed
        # may be lost only when an older one begins, and is then the oldest.
        steps = sum(sequence.prompt_length + sequence.max_tokens for sequence in self.live.values())
        # Where steps overlap, one may be there for a token that is dropped.  Between two there may be short steps.
        most_short = 0 if self.costs is None else MAX_SHORT_STEPS
        return (1 + most_short) * (4 * steps + (len(self.live) + 1 if self._overlap else 0))

    def _check_plan(self, plan: StepPlan, decoding: list[Sequence], *, ahead: bool) -> None:
        scheduled = [item.sequence for item in plan.scheduled]
        assert len(set(map(id, scheduled))) == len(scheduled), "a sequence was scheduled twice"
        assert plan.num_tokens <= self._max_num_batched_tokens
        if plan.num_guesses and self._max_guess_rows is not None:
            assert plan.num_tokens <= self._max_guess_rows
            assert all(own in decoding for own in scheduled), "a step with guesses computes a prompt"
        assert sum(len(item.samples) for item in plan.scheduled) <= self._max_num_seqs
        assert ahead or bool(scheduled) == bool(self.live)
        self._short_in_a_row = self._short_in_a_row + 1 if plan.short else 0
        if plan.short:
            owners = {own.owner for own in scheduled}
            decoding = [own for own in decoding if own.owner in owners]
            assert owners, "a short step computes nothing"
            assert any(own.owner not in owners for own in self.waiting), "no other client asks for more than it has"
            assert self._short_in_a_row <= MAX_SHORT_STEPS
        elif self.running:
            first = min(self.running, key=_age)
            waits = ahead and (first.num_uncomputed == 0 or first.awaits_its_last_token)
            assert waits or first in scheduled, "the oldest sequence does not advance"
        assert scheduled[: len(decoding)] == decoding, "decodes come first, and all that were not preempted"
        for sequence in self.running:
            most = max(sequence.num_tokens, sequence.num_computed)
            blocks = len(sequence.block_table)
            if plan.short and sequence not in scheduled:
                # Its next step will reserve the block of its last token.
                assert blocks in (self.pool.blocks_for(sequence.num_computed), self.pool.blocks_for(most))
            else:
                assert blocks == self.pool.blocks_for(most)
        for item in plan.scheduled:
            sequence, end = item.sequence, item.end
            drawn_now = item.draws if sequence in item.samples else 0
            known_or_pending = sequence.num_tokens + sequence.num_pending - drawn_now + len(item.guesses)
            assert end == sequence.num_computed
            assert item.start < end <= known_or_pending
            assert item.samples[:1] == ((sequence,) if end == known_or_pending and sequence.max_tokens else ())
            assert all(own.num_output_tokens + own.num_pending <= own.max_tokens for own in item.samples), (
                "overscheduled"
            )
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
        assert item.report_from == (first if first < min(item.end, sequence.prompt_length) else None)
        assert item.report_from is None or item.report_from >= item.start
        self._reported[sequence.key] = max(self._reported[sequence.key], min(item.end, sequence.prompt_length))

    def _check_finished(self, sequence: Sequence) -> None:
        (key,) = (key for key, own in self.live.items() if own is sequence)
        prompt, output = (
            sequence.token_ids[: sequence.prompt_length],
            sequence.token_ids[sequence.prompt_length :],
        )
        alone = generate_alone(prompt, sequence.max_tokens, sequence.stop_token_ids, sequence.sample_index)
        assert (output, sequence.finish_reason) == alone
        if key in self._expected.first_hits:
            assert sequence.cached_tokens == self._expected.first_hits[key]
        assert sequence.num_reported == sequence.prompt_length
        self.finished[key] = self.live.pop(key)
        self._leaving.append(sequence)

    def _needs_a_block(self, sequence: Sequence) -> bool:
        """Whether its next token fits into no block of its own."""
        index = sequence.num_computed // self.pool.block_size
        return index == len(sequence.block_table) or self.pool.is_shared(sequence.block_table[index])

    def _state(self, sequence: Sequence) -> str:
        if any(sequence in item.members for plan in self.under_way for item in plan.scheduled):
            return "in a step"
        if sequence.leader is not None:
            return "before its prompt was computed by another"
        kind = "running" if sequence.block_table else "queued"
        return f"{kind}, before others with its prompt" if sequence.forks else kind
