"""A scheduler driven step by step, with a fake model and every promise checked at every step.

The fake model keeps, in place of keys and values, the tokens they would have been computed from, so a block that is
stale, wrongly shared or overwritten is seen by the first step that reads it.  It computes as late as it may: a step's
reads and writes happen when the step is waited for, after the next was planned where steps overlap.
"""

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from operator import attrgetter
from zlib import crc32

import msgspec

from persimmon.model.sampling_params import SamplingParams
from persimmon.server.engine.blocks import BlockPool
from persimmon.server.engine.guesses import Speculation
from persimmon.server.engine.messages import EngineStats, Pooling
from persimmon.server.engine.proposers import NO_PROPOSAL, Proposal
from persimmon.server.engine.scheduler import Scheduler
from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.short_steps import MAX_SHORT_STEPS
from persimmon.server.engine.step_cost import StepCosts
from persimmon.server.engine.step_plan import Advance, ScheduledSequence, StepPlan

_rank = attrgetter("rank")
_age = attrgetter("age")

VOCABULARY = 3
"""So few tokens that prompts and answers often share prefixes."""


def next_token(token_ids: Ids[int], sample_index: int = 0) -> int:
    """What the fake model says after these tokens; samples of one prompt differ."""
    return crc32(bytes([*token_ids, *[255] * sample_index])) % VOCABULARY


def generate_alone(
    prompt: Ids[int], max_tokens: int, stop_token_ids: Iterable[int] = (), sample_index: int = 0
) -> tuple[list[int], str]:
    """The answer and finish reason of a sequence that has the machine to itself."""
    token_ids, stops = list(prompt), set(stop_token_ids)
    for _ in range(max_tokens):
        token_ids.append(next_token(token_ids, sample_index))
        if token_ids[-1] in stops:
            return token_ids[len(prompt) :], "stop"
    return token_ids[len(prompt) :], "length"


@dataclass(frozen=True)
class OneProposal:
    """Guesses once: what comes after a sequence of this many tokens."""

    num_tokens: int
    guesses: list[int]

    def propose(self, token_ids: Ids[int], count: int) -> Proposal:
        assert count > 0
        return Proposal(self.guesses[:count], 1) if len(token_ids) == self.num_tokens else NO_PROPOSAL


@dataclass(frozen=True)
class Oracle:
    """Makes guesses in every step; those at regular intervals are wrong."""

    sample_index: int
    max_guesses: int
    right_in_a_row: int

    def propose(self, token_ids: Ids[int], count: int) -> Proposal:
        known = list(token_ids)
        for _ in range(min(count, self.max_guesses)):
            right = next_token(known, self.sample_index)
            known.append(right if len(known) % (self.right_in_a_row + 1) else (right + 1) % VOCABULARY)
        return Proposal(known[len(token_ids) :], 1)


@dataclass(frozen=True)
class Preemption:
    """A preemption as it happened.

    Attributes:
        victim: the sequence that lost its blocks.
        blocks: how many it had.
        others: those that ran with it, with their blocks.
        samples: of each of them and of the victim, how many it had: itself and its forks, which may begin in this plan.
        for_blocks: whether blocks were missing; else it made room for another client.
    """

    victim: Sequence
    blocks: int
    others: list[tuple[Sequence, int]]
    samples: dict[Sequence, int]
    for_blocks: bool


def watch_preemptions(scheduler: Scheduler) -> list[Preemption]:
    """A list that gets the scheduler's preemptions: a sequence that comes straight back may get the blocks it gave up."""
    batch = scheduler._running
    preempt, seen = batch.preempt, list[Preemption]()

    def noted(victim: Sequence) -> None:
        seen.append(
            Preemption(
                victim=victim,
                blocks=len(victim.block_table),
                others=[(own, len(own.block_table)) for own in batch.sequences if own is not victim],
                samples={own: len(own.family) for own in batch.sequences},
                for_blocks=scheduler._tables.missing(batch.sequences) > 0,
            )
        )
        preempt(victim)

    vars(batch)["preempt"] = noted
    return seen


@dataclass(frozen=True)
class LaunchedPart:
    """A part of a step as a device gets it: what it knows of the sequence does not change any more."""

    item: ScheduledSequence
    token_ids: list[int]
    pending_row: int | None
    block_table: list[int]

    @classmethod
    def of(cls, item: ScheduledSequence) -> "LaunchedPart":
        sequence = item.sequence
        known = [*sequence.token_ids[: item.end], *item.guesses]
        assert len(known) == item.end - (item.pending_row is not None)
        return cls(item=item, token_ids=known, pending_row=item.pending_row, block_table=list(sequence.block_table))

    def tokens(self, sampled_before: list[int]) -> list[int]:
        """The sequence up to the end of the part."""
        if self.pending_row is None:
            return self.token_ids
        return [*self.token_ids, *sampled_before[self.pending_row : self.pending_row + 1]]


class FakeModel:
    """Runs plans over a cache whose slots remember which tokens their content depends on."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._slots: list[tuple[int, ...] | None] = [None] * (num_blocks * block_size)
        self._launched: deque[tuple[list[tuple[int, int]], list[LaunchedPart]]] = deque()
        self._sampled: list[int] = []

    def launch(self, plan: StepPlan) -> None:
        """Takes a step, which will be computed when it is waited for."""
        self._launched.append((list(plan.copies), [LaunchedPart.of(item) for item in plan.scheduled]))

    def blocks_to_write(self) -> set[int]:
        """The blocks that launched steps have not written yet."""
        size = self._block_size
        blocks = {target for copies, _ in self._launched for _, target in copies}
        for _, parts in self._launched:
            for part in parts:
                blocks |= set(part.block_table[part.item.start // size : -(-part.item.end // size)])
        return blocks

    def wait(self) -> list[list[int]]:
        """Computes the oldest launched step and samples, reading the cache before and after all writes of the step."""
        copies, parts = self._launched.popleft()
        self._copy(copies)
        for part in parts:
            self._read(part, part.item.start)
        for part in parts:
            token_ids = part.tokens(self._sampled)
            for position in range(part.item.start, part.item.end):
                self._slots[self._slot(part, position)] = tuple(token_ids[: position + 1])
        for part in parts:
            self._read(part, part.item.end)
        drawn = [
            [
                next_token(part.tokens(self._sampled)[: part.item.end - later], sample.sample_index)
                for later in range(part.item.draws - 1, -1, -1)
            ]
            for part in parts
            for sample in part.item.samples
        ]
        self._sampled = [tokens[-1] for tokens in drawn]
        return drawn

    def fail(self) -> None:
        """The oldest launched step computes nothing."""
        self._launched.popleft()
        self._sampled = []

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        size = self._block_size
        targets = [target for _, target in copies]
        assert len(set(targets)) == len(targets), "two blocks are copied into one"
        before = list(self._slots)
        for source, target in copies:
            self._slots[target * size : (target + 1) * size] = before[source * size : (source + 1) * size]

    def _read(self, part: LaunchedPart, end: int) -> None:
        if all(own.finished for own in part.item.members):
            return  # its results are not used
        token_ids = part.tokens(self._sampled)
        for position in range(end):
            held = self._slots[self._slot(part, position)]
            wanted = tuple(token_ids[: position + 1])
            assert held == wanted, f"position {position} of {part.item.sequence.key} attends to {held}, not {wanted}"

    def _slot(self, part: LaunchedPart, position: int) -> int:
        return part.block_table[position // self._block_size] * self._block_size + position % self._block_size


def _counting(sequence: Sequence, item: ScheduledSequence, drawn: list[int]) -> list[int]:
    """The tokens that count of those drawn at a sequence's guesses."""
    counting = []
    for place, token in enumerate(drawn):
        counting.append(token)
        ends = token in sequence.stop_token_ids or sequence.num_output_tokens + len(counting) == sequence.max_tokens
        if ends or item.guesses[place : place + 1] != [token]:
            break
    return counting


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
        self._first_hits: dict[int, int] = {}
        self._families: dict[int, int] = {}
        self._counted: set[int] = set()
        self._reported: Counter[Hashable] = Counter()
        self._expected = EngineStats(
            running=0, waiting=0, free_blocks=num_blocks, total_blocks=num_blocks, steps=0, prompt_tokens=0,
            generated_tokens=0, cached_tokens=0, queried_tokens=0, preemptions=0, recomputed_tokens=0, drafts=0,
            draft_tokens=0, accepted_tokens=0,
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
        self._account_for(before, plan, preempted)
        assert not (preempted and ahead), "a sequence was preempted while a step was under way"
        assert missing > 0 or not any(each.for_blocks for each in preemptions), "there were enough blocks"
        assert sum(not each.for_blocks for each in preemptions) <= 1
        done_before = {own: before[key][0] for key, own in self.live.items()}
        for each in preemptions:
            self._check_preemption(each, done_before)
        self._check_plan(plan, [sequence for sequence in decoding if sequence not in preempted], ahead=ahead)
        if plan.scheduled:
            self._model.launch(plan)
            self.under_way.append(plan)
        self.check()
        return plan

    def _check_preemption(self, preemption: Preemption, done: dict[Sequence, int]) -> None:
        victim = preemption.victim
        everyone = [(victim, preemption.blocks), *preemption.others]
        slots, blocks = Counter[str](), Counter[str]()
        for own, count in everyone:
            slots[own.owner] += preemption.samples[own]
            blocks[own.owner] += count
        weights = {own.owner: own.weight for own in self.live.values()}
        equals = [own for own, _ in preemption.others if (own.owner, own.priority) == (victim.owner, victim.priority)]
        if preemption.for_blocks:
            oldest, *others = sorted([own for own, _ in everyone], key=_age)
            assert victim is not oldest, "the oldest is preempted"
            assert all(victim.priority >= own.priority for own in others), "a lower priority is preempted first"
            rivals = [own.owner for own in others if own.priority == victim.priority]
            held = {owner: blocks[owner] / weights[owner] for owner in rivals}
            assert held[victim.owner] == max(held.values()), "the client that holds most is preempted first"
            assert all(done[victim] <= done[own] for own in equals if own is not oldest), "it had not computed least"
            return
        oldest = min([own for own, _ in everyone if own.owner == victim.owner], key=_age)
        assert victim is not oldest, "the oldest of a client is preempted for another client"
        # Without one that holds more the client might hold less than the newcomer's, so it is no candidate.
        held_by = dict(preemption.others)
        for own in equals:
            as_small = preemption.samples[own] <= preemption.samples[victim] and held_by[own] <= preemption.blocks
            assert own is oldest or not as_small or done[victim] <= done[own], "it had not computed least"

        def part(owner: str, more_slots: int, more_blocks: int) -> float:
            of_slots = (slots[owner] + more_slots) / self._max_num_seqs
            return max(of_slots, (blocks[owner] + more_blocks) / self.pool.num_blocks) / weights[owner]

        newcomers = {
            own.owner for own in self.live.values() if own.owner != victim.owner and own.priority <= victim.priority
        }
        left = part(victim.owner, -preemption.samples[victim], -preemption.blocks)
        assert any(part(owner, 1, 0) <= left for owner in newcomers), "no other client has less than its share"

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
        expected = []
        row = 0
        for item in plan.scheduled:
            for sample in item.samples:
                if not sample.finished:
                    expected.append(Advance(sample, _counting(sample, item, drawn[row]), row))
                row += 1
            sequence = item.sequence
            if not sequence.finished and sequence.max_tokens == 0 and item.end == sequence.prompt_length:
                expected.append(Advance(sequence, [], row))
            if item.guesses and not sequence.finished:
                right = sum(token == guess for token, guess in zip(expected[-1].tokens, item.guesses, strict=False))
                self._expected = msgspec.structs.replace(
                    self._expected,
                    drafts=self._expected.drafts + 1,
                    draft_tokens=self._expected.draft_tokens + len(item.guesses),
                    accepted_tokens=self._expected.accepted_tokens + right,
                )
        advanced = self.scheduler.commit(plan, drawn)
        assert advanced == expected
        generated = sum(len(advance.tokens) for advance in advanced)
        self._expected = msgspec.structs.replace(
            self._expected,
            steps=self._expected.steps + 1,
            generated_tokens=self._expected.generated_tokens + generated,
        )
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
        self._expected = msgspec.structs.replace(
            self._expected,
            running=len(started),
            waiting=len(waiting),
            free_blocks=self.pool.num_blocks - len(references),
        )
        assert self.stats == self._expected

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
        if key in self._first_hits:
            assert sequence.cached_tokens == self._first_hits[key]
        assert sequence.num_reported == sequence.prompt_length
        self.finished[key] = self.live.pop(key)
        self._leaving.append(sequence)

    def _account_for(self, before: dict[int, tuple[int, list[int]]], plan: StepPlan, preempted: list[Sequence]) -> None:
        """Adds to the expected totals what a plan did, as seen from the block tables before and after it.

        Who was preempted may have come straight back: where twins had computed the same prefix side by side, one can
        share the other's blocks.
        """
        begun = [fork for item in plan.scheduled for fork in item.samples[1:]]
        starts = {item.sequence.key: item.start for item in plan.scheduled}
        prompt_tokens = cached_tokens = queried_tokens = recomputed_tokens = 0
        for key, sequence in self.live.items():
            if sequence in begun:
                continue
            num_computed, block_table = before[key]
            computed = starts.get(key, sequence.num_computed)
            kept = block_table != [] and sequence not in preempted
            if kept:
                assert computed == num_computed
                assert len(sequence.block_table) >= len(block_table)
                assert all(
                    now == then or (then, now) in plan.copies
                    for now, then in zip(sequence.block_table, block_table, strict=False)
                )
            elif block_table:
                recomputed_tokens += num_computed
            if sequence.block_table and not kept:
                cached_tokens += computed
                queried_tokens += sequence.num_tokens
                # The prompt of several samples counts once, and so do the hits of the first that is admitted.
                if self._families[key] not in self._counted:
                    self._counted.add(self._families[key])
                    self._first_hits[key] = computed
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
