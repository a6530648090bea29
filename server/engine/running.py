"""The sequences that hold blocks: which waiting ones join them, and which give their blocks up.

Knows nothing of what a step computes.
"""

from bisect import insort
from collections.abc import Iterable, Set
from itertools import islice
from operator import attrgetter

from persimmon.server.engine.admission import Admission, Growing
from persimmon.server.engine.block_tables import BlockNeed, BlockTables
from persimmon.server.engine.guesses import Guesses
from persimmon.server.engine.preemption import lost_least, owed_to
from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.shares import Holdings, Share
from persimmon.server.engine.waiting import WaitingQueue

_rank = attrgetter("rank")

MAX_OVERTAKEN = 8
"""Maximum number of waiting sequences, waiting for a prefix that is being computed, that others may overtake."""


class RunningBatch:
    """Running sequences, each of which may lead forks that will share its blocks.

    Its length is the number of both: each fork of a running sequence will run, so it counts.

    Args:
        tables: the sequences' blocks.
        waiting: the sequences that may join.
        guesses: what guesses the tokens of running sequences.
        admission: how many may join.
        whole: what may run at once: sequences, and blocks of the pool.

    Attributes:
        sequences: those that hold blocks, by rank.
        pending_forks: forks of theirs whose prompts are not computed yet.
        prompt_tokens: a total, as in `EngineStats`; so are the others.
        queried_tokens: tokens looked up in the prefix cache.
        cached_tokens: tokens found there.
        preemptions: times that a sequence was preempted.
        recomputed_tokens: computed tokens that preemptions threw away.
    """

    def __init__(
        self, *, tables: BlockTables, waiting: WaitingQueue, guesses: Guesses, admission: Admission, whole: Holdings
    ) -> None:
        self.sequences: list[Sequence] = []
        self.pending_forks = 0
        self.prompt_tokens = 0
        self.queried_tokens = 0
        self.cached_tokens = 0
        self.preemptions = 0
        self.recomputed_tokens = 0
        self._tables = tables
        self._waiting = waiting
        self._guesses = guesses
        self._admission = admission
        self._whole = whole

    def __len__(self) -> int:
        return len(self.sequences) + self.pending_forks

    @property
    def may_grow(self) -> bool:
        """Whether sequences wait, and there may be more than run."""
        return bool(self._waiting) and len(self) < self._whole.sequences

    @property
    def must_preempt(self) -> bool:
        """Whether `make_room` would preempt a sequence."""
        return self._tables.missing(self.sequences) > 0 or self._yielding() is not None

    def decoding(self, clients: Set[Share] | None = None) -> list[Sequence]:
        """The sequences of all clients, or of some, that get a token in the next step."""
        return [
            sequence
            for sequence in self.sequences
            if sequence.num_uncomputed == 1
            and not sequence.awaits_its_last_token
            and (clients is None or sequence.share in clients)
        ]

    def prompts(self, clients: Set[Share] | None = None) -> list[Sequence]:
        """The sequences of all clients, or of some, with prompt tokens that no step computes yet."""
        return [
            sequence
            for sequence in self.sequences
            if sequence.num_pending == 0
            and sequence.num_uncomputed > 0
            and (clients is None or sequence.share in clients)
        ]

    def make_room(self) -> None:
        """Preempts sequences until all that decode have a block, and one that gives way to another client's.

        No step may be under way.
        """
        while self._tables.missing(self.sequences) > 0:
            self.preempt(lost_least(self.sequences))
        yielding = self._yielding()
        if yielding is not None:
            self.preempt(yielding)

    def admit(self, clients: Set[Share] | None) -> None:
        """Gives blocks to those that wait, in their order, as long as there are enough for all to grow.

        Args:
            clients: whose sequences may begin, as long as a block is left for each that runs; None for all clients'.
        """
        growing: list[Growing] | None = None
        while self.may_grow:
            found = self._next_waiting()
            if found is None:
                return
            sequence, need = found
            if clients is not None and (sequence.share not in clients or need.left < len(self.sequences)):
                return
            if growing is None:
                growing = []
                for own in self.sequences:
                    growing += [self._growing(own, len(own.block_table))] * (1 + len(own.forks))
            newcomer = self._growing(sequence, len(need.hits) + need.new)
            most = min(1 + len(sequence.forks), self._whole.sequences - len(self))
            samples = self._admission.fits(growing, newcomer, most, need.left)
            if samples == 0:
                if need.left < 0 or owed_to(sequence, need.new, self.sequences, self._whole) is None:
                    return
                samples = 1  # if blocks run short later, clients that hold more than their share give theirs up
            self._begin(sequence, need, samples)
            growing += [newcomer] * samples

    def begin_forks(self, sequence: Sequence, end: int) -> list[Sequence]:
        """Makes a sequence's forks run with it, in its blocks, as if their prompt were computed up to `end`."""
        forks = sequence.forks
        place = self.sequences.index(sequence) + 1
        self.sequences[place:place] = forks
        self.pending_forks -= len(forks)
        for fork in forks:
            self._tables.fork(sequence, fork)
            self._guesses.begin(fork)
            fork.leader = None
            fork.continue_from(sequence)
            fork.num_computed = end
        sequence.forks = []
        return forks

    def preempt(self, victim: Sequence) -> None:
        """Takes a sequence's blocks back, and queues it again."""
        self._take_out(victim)
        self.preemptions += 1
        self.recomputed_tokens += victim.num_computed
        self._admission.lose(victim.num_computed)
        victim.num_computed = 0
        self._waiting.add(victim)

    def end(self, ended: Iterable[Sequence]) -> None:
        """Takes out sequences that have finished."""
        for sequence in ended:
            self._retire(sequence)
        self.sequences = [sequence for sequence in self.sequences if not sequence.finished]

    def abort(self, sequence: Sequence) -> Sequence | None:
        """Takes out a sequence that runs, waits, or is a fork of such a one; it has finished.

        Returns:
            The first of its forks, which has taken its place; None where it has none.
        """
        leader = sequence.leader
        if leader is not None:
            leader.forks.remove(sequence)
            if leader.block_table:
                self.pending_forks -= 1
        elif sequence.forks:
            successor = sequence.forks.pop(0)
            self._replace(sequence, successor)
            return successor
        elif sequence.block_table:
            self._take_out(sequence)
        else:
            self._waiting.remove(sequence)
        return None

    def _replace(self, sequence: Sequence, successor: Sequence) -> None:
        self._tables.hand_over(sequence, successor)
        if successor.block_table:
            self.sequences[self.sequences.index(sequence)] = successor
            self.pending_forks -= 1
            self._guesses.begin(successor)
        else:
            self._waiting.replace(sequence, successor)

    def _take_out(self, sequence: Sequence) -> None:
        self.sequences.remove(sequence)
        self.pending_forks -= len(sequence.forks)
        self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
        """Gives a sequence's blocks back, unless a step under way may write them: then its end does."""
        self._guesses.release(sequence)
        self._tables.retire(sequence)

    def _next_waiting(self) -> tuple[Sequence, BlockNeed] | None:
        """The sequence to be admitted next, and the blocks that it needs.

        A prefix is computed once, though several that have it arrive together: those wait for it, and a few others may
        overtake them.
        """
        for sequence in islice(self._waiting.in_order(), MAX_OVERTAKEN + 1):
            need = self._tables.need(sequence)
            if need is not None:
                return sequence, need
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
        newcomer, need = found
        if need.left >= 0 and self.may_grow:
            return None
        return owed_to(newcomer, need.new, self.sequences, self._whole)

    def _growing(self, sequence: Sequence, blocks: int) -> Growing:
        return self._admission.growing(sequence.prompt_length, sequence.num_output_tokens, sequence.max_tokens, blocks)

    def _begin(self, sequence: Sequence, need: BlockNeed, samples: int) -> None:
        """Makes a waiting sequence run.

        Args:
            sequence: which waits.
            need: the blocks that it gets.
            samples: how many of its samples begin; the others go on waiting.
        """
        self._tables.begin(sequence, need)
        first_time = sequence.cached_tokens is None
        self._waiting.admit(sequence, sequence.num_uncomputed if first_time else 0)
        self._split(sequence, samples - 1)
        insort(self.sequences, sequence, key=_rank)
        self.pending_forks += len(sequence.forks)
        self._guesses.begin(sequence)
        self.queried_tokens += sequence.num_tokens
        self.cached_tokens += sequence.num_computed
        if first_time:
            sequence.cached_tokens = sequence.num_computed
            self.prompt_tokens += sequence.prompt_length

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
