"""What a scheduler should report: worked out from its block tables and from what was drawn."""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Ids

import msgspec

from persimmon.server.engine.messages import EngineStats
from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.step_plan import Advance, ScheduledSequence, StepPlan


def expected_advances(plan: StepPlan, drawn: Ids[list[int]]) -> list[Advance]:
    """What the commit of a step should return, if it is called before that."""
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
    return expected


def _counting(sequence: Sequence, item: ScheduledSequence, drawn: list[int]) -> list[int]:
    """The tokens that count of those drawn at a sequence's guesses."""
    counting = []
    for place, token in enumerate(drawn):
        counting.append(token)
        ends = token in sequence.stop_token_ids or sequence.num_output_tokens + len(counting) == sequence.max_tokens
        if ends or item.guesses[place : place + 1] != [token]:
            break
    return counting


class ExpectedStats:
    """The statistics that a scheduler should have.

    Attributes:
        stats: as they should be now.
        first_hits: of sequences by key, the tokens that the first admitted sample of their prompt found in the cache.
    """

    def __init__(self, num_blocks: int) -> None:
        self.stats = EngineStats(
            running=0, waiting=0, free_blocks=num_blocks, total_blocks=num_blocks, steps=0, prompt_tokens=0,
            generated_tokens=0, cached_tokens=0, queried_tokens=0, preemptions=0, recomputed_tokens=0, drafts=0,
            draft_tokens=0, accepted_tokens=0,
        )  # fmt: skip
        self.first_hits: dict[int, int] = {}
        self._families: dict[int, int] = {}
        self._counted: set[int] = set()

    def add(self, keys: Ids[int]) -> None:
        """Takes notice of the samples of a prompt."""
        self._families |= dict.fromkeys(keys, keys[0])

    def set_levels(self, *, running: int, waiting: int, free_blocks: int) -> None:
        """Replaces the levels."""
        self.stats = msgspec.structs.replace(self.stats, running=running, waiting=waiting, free_blocks=free_blocks)

    def count_step(self, plan: StepPlan, advanced: Iterable[Advance]) -> None:
        """Counts a step that was committed."""
        tokens = {advance.sequence: advance.tokens for advance in advanced}
        guesses = [(item.guesses, tokens[item.sequence]) for item in plan.scheduled if item.sequence in tokens]
        right = sum(token == guess for guessed, drawn in guesses for token, guess in zip(drawn, guessed, strict=False))
        self._count(
            steps=1,
            generated_tokens=sum(map(len, tokens.values())),
            drafts=sum(bool(guessed) for guessed, _ in guesses),
            draft_tokens=sum(len(guessed) for guessed, _ in guesses),
            accepted_tokens=right,
        )

    def count_plan(
        self,
        live: Mapping[int, Sequence],
        before: Mapping[int, tuple[int, list[int]]],
        plan: StepPlan,
        preempted: list[Sequence],
    ) -> None:
        """Counts what a plan did, as seen from the block tables before and after it.

        A preempted sequence may have come straight back: where twins had computed the same prefix side by side, one can
        share the other's blocks.

        Args:
            live: all sequences that have not finished, by key.
            before: of each, how many tokens were computed before the plan, and its block table then.
            plan: the step.
            preempted: the sequences that lost their blocks to it.
        """
        begun = [fork for item in plan.scheduled for fork in item.samples[1:]]
        starts = {item.sequence.key: item.start for item in plan.scheduled}
        prompt_tokens = cached_tokens = queried_tokens = recomputed_tokens = 0
        for key, sequence in live.items():
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
                    self.first_hits[key] = computed
                    prompt_tokens += sequence.prompt_length
        self._count(
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            queried_tokens=queried_tokens,
            preemptions=len(preempted),
            recomputed_tokens=recomputed_tokens,
        )

    def _count(self, **more: int) -> None:
        self.stats = msgspec.structs.replace(
            self.stats, **{name: getattr(self.stats, name) + count for name, count in more.items()}
        )
