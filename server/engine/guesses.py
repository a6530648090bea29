"""Guesses at what sequences get next: how many a step computes, and what becomes of them.

A token is drawn at the last known token and at each guess that follows it.  It counts if the guesses before it were
right, so the answer is the same as with a token a step.
"""

from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from operator import eq

from persimmon.server.engine.blocks import BlockPool
from persimmon.server.engine.grammar_proposer import GrammarProposer
from persimmon.server.engine.guess_memory import GuessMemory
from persimmon.server.engine.guess_worth import GuessWorth
from persimmon.server.engine.proposers import Lookup, LookupProposer, Proposer
from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.step_cost import StepCosts
from persimmon.server.engine.step_plan import ScheduledSequence, StepPlan
from persimmon.server.settings.speculation import SpeculativeConfig

PROMPT_END = 16
"""Tokens of a prompt that are kept with its answer, so that the beginning of another answer is found too."""


@dataclass(frozen=True, slots=True)
class Speculation:
    """How next tokens are guessed.

    Attributes:
        make_proposer: makes what guesses the next tokens of a sequence; None where only what grammars force is guessed.
        adaptive: whether a step has as many guesses as pay; else as many as are proposed.
        memory: what the proposers share; None where they share nothing.
    """

    make_proposer: Callable[[Sequence], Proposer] | None = None
    adaptive: bool = False
    memory: GuessMemory | None = None

    @classmethod
    def of(cls, config: SpeculativeConfig | None, max_num_seqs: int, max_model_len: int) -> "Speculation | None":
        """What a configuration asks for; None for no guesses.

        Args:
            config: how tokens are guessed; None for only what grammars force, as far as it pays.
            max_num_seqs: sequences that run at once, at most.
            max_model_len: tokens of one, at most.
        """
        if config is None:
            return cls(adaptive=True)
        if config.method == "off":
            return None
        if config.method == "ngram":
            shortest, longest = config.lookup
            lookup = Lookup(config.max_guesses, shortest, longest)
        else:
            lookup = Lookup(config.max_guesses, as_many_as_matched=config.method == "suffix")
        memory = GuessMemory(max_num_seqs, max_model_len, keeps_answers=config.method != "ngram")

        def make_proposer(sequence: Sequence) -> Proposer:
            leader = None if sequence.leader is None else sequence.leader.proposer
            if isinstance(leader, GrammarProposer):
                leader = leader.other
            return LookupProposer(
                lookup,
                memory,
                prompt=leader.prompt if isinstance(leader, LookupProposer) else memory.index(sequence.prompt_length),
                prompt_length=sequence.prompt_length,
                max_tokens=sequence.max_tokens,
                salt=sequence.cache_salt,
                acceptance=sequence.acceptance,
            )

        return cls(make_proposer, adaptive=config.method == "auto", memory=memory)


class Guesses:
    """Guesses within the limits of steps and of a block pool.

    Args:
        pool: the KV blocks.
        max_num_seqs: sequences that hold blocks at once, at most.
        max_num_batched_tokens: token budget of a step.
        max_rows: most tokens of a step with guesses, which then has no prompts; None where that is not limited.
        speculation: how tokens are guessed; None where none is.

    Attributes:
        enabled: whether tokens are guessed.
        max_rows: as given.
        drafts: times that a sequence had guesses in a step.
        draft_tokens: guesses that were computed.
        accepted_tokens: of these, those that the sequence then got.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_rows: int | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self.enabled = speculation is not None
        self.max_rows = max_rows
        self.drafts = 0
        self.draft_tokens = 0
        self.accepted_tokens = 0
        self._pool = pool
        self._max_in_step = max_num_batched_tokens - max_num_seqs
        self._speculation = speculation
        self._memory = None if speculation is None else speculation.memory
        self._worth = GuessWorth() if speculation is not None and speculation.adaptive else None

    def begin(self, sequence: Sequence) -> None:
        """Gives a sequence that begins to run what guesses its tokens.

        Forks still have their leader then, whose index of the prompt they share.
        """
        if self._speculation is not None and sequence.speculate:
            if self._worth is not None and sequence.acceptance is None:
                sequence.acceptance = self._worth.acceptance()
            make_proposer, forced = self._speculation.make_proposer, sequence.forced
            proposer = None if make_proposer is None else make_proposer(sequence)
            if forced is not None:
                proposer = GrammarProposer(forced, proposer, sequence.acceptance)
            sequence.proposer = proposer

    def release(self, sequence: Sequence) -> None:
        """Frees what has been indexed of a sequence that no longer runs.

        The answer of one that has ended is kept for others, with the end of its prompt.
        """
        if self._speculation is None or sequence.proposer is None:
            return
        sequence.proposer = None
        if self._memory is not None and sequence.finished and sequence.num_output_tokens > 0:
            begin = max(0, sequence.prompt_length - PROMPT_END)
            self._memory.remember(sequence.cache_salt, sequence.token_ids[begin:])

    def plan(self, plan: StepPlan, decoding: Ids[Sequence], num_running: int, costs: StepCosts | None) -> Ids[Ids[int]]:
        """The guesses that each sequence that decodes computes in a step; reserves their blocks.

        As many as a sequence's limit on tokens, the step's room and the free blocks allow, and as pay.  Each sequence
        that may run can still have a token, since the oldest may be admitted in this step, and each that runs a block.
        None where forks begin, each of which draws at the last known token.

        Args:
            plan: the step.
            decoding: the sequences, whose next tokens have their blocks; at least one.
            num_running: sequences that hold blocks.
            costs: what steps cost; None where nothing is known of that.
        """
        none: list[Ids[int]] = [()] * len(decoding)
        worth = self._worth
        if not self._begin_step(decoding, costs):
            return none
        size, left = self._pool.block_size, self._room(len(decoding))
        free = max(0, self._pool.num_free - num_running)
        chosen = list(none)
        for place, sequence in enumerate(decoding):
            proposer = sequence.proposer
            if proposer is None or sequence.num_pending or sequence.forks:
                continue
            acceptance = sequence.acceptance
            if _rests(sequence):
                continue
            token_ids = sequence.token_ids
            known, blocks = len(token_ids), len(sequence.block_table)
            last = sequence.prompt_length + sequence.max_tokens - 1
            room = min(last - known, left, (blocks + free) * size - known)
            if room <= 0:
                continue
            proposal = proposer.propose(token_ids, room)
            guesses = proposal.token_ids
            if worth is not None and acceptance is not None:
                guesses = guesses[: worth.count(acceptance, proposal)]
                acceptance.note(paid=bool(guesses))
            if guesses:
                chosen[place] = guesses
                left -= len(guesses)
                free -= max(0, self._pool.blocks_for(known + len(guesses)) - blocks)
        if worth is not None and not worth.pays():
            return none
        for sequence, guesses in zip(decoding, chosen, strict=True):
            if guesses:
                table = sequence.block_table
                end = sequence.num_tokens + len(guesses)
                table += self._pool.allocate(max(0, self._pool.blocks_for(end) - len(table)))
                plan.num_guesses += len(guesses)
        return chosen

    def expected(self, decoding: Ids[Sequence], costs: StepCosts | None) -> bool:
        """Whether the step after the one under way may have guesses, by what is known before that one has ended.

        The token that a sequence is about to get is taken to be the first that is proposed; guesses come after it.

        Args:
            decoding: the sequences that decode in the next step; at least one.
            costs: what steps cost; None where nothing is known of that.
        """
        worth, room = self._worth, self._room(len(decoding))
        if room <= 0 or not self._begin_step(decoding, costs):
            return False
        found = False
        for sequence in decoding:
            proposer, acceptance = sequence.proposer, sequence.acceptance
            left = min(sequence.max_tokens - sequence.num_output_tokens - sequence.num_pending - 1, room)
            if proposer is None or sequence.forks or left <= 0 or _rests(sequence):
                continue
            proposal = proposer.propose(sequence.token_ids, 1 + left)
            paid = len(proposal.token_ids) > 0
            if worth is not None and acceptance is not None:
                paid = worth.count(acceptance, proposal) > 1
                acceptance.note(paid=paid)
            found |= paid
        return found and (worth is None or worth.paying)

    def _begin_step(self, decoding: Ids[Sequence], costs: StepCosts | None) -> bool:
        """Begins to look for guesses; whether any may pay."""
        if self._worth is not None:
            context = sum([sequence.num_computed for sequence in decoding])
            if not self._worth.begin(costs, len(decoding), context):
                return False
        if self._memory is not None:
            self._memory.begin_step()
        return True

    def _room(self, rows: int) -> int:
        """Most guesses of a step in which this many sequences decode."""
        return self._max_in_step if self.max_rows is None else min(self._max_in_step, self.max_rows - rows)

    def commit(self, item: ScheduledSequence, drawn: list[int]) -> list[int]:
        """Gives a sequence what was drawn at its last known token and at its guesses, as far as it counts.

        It discards the guesses that do not count.  Blocks that only these needed are free; none of them is in
        the prefix index, since they were not full of tokens that the sequence holds.

        Returns:
            The tokens that count, at least one.
        """
        sequence = item.sequence
        taken = sequence.accept(drawn, item.guesses)
        self.drafts += 1
        self.draft_tokens += len(item.guesses)
        self.accepted_tokens += sum(map(eq, taken, item.guesses))
        sequence.num_computed -= item.draws - len(taken)
        kept = self._pool.blocks_for(sequence.num_computed)
        self._pool.release(sequence.block_table[kept:])
        del sequence.block_table[kept:]
        return taken


def _rests(sequence: Sequence) -> bool:
    """Whether no guess is looked for in a step, because none paid lately."""
    acceptance = sequence.acceptance
    if acceptance is None or not acceptance.rest or sequence.forced is not None:
        return False
    acceptance.rest -= 1
    return True
