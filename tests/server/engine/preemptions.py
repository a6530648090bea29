"""Preemptions as they happen in a scheduler, and whether the right sequence was chosen."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from operator import attrgetter

from persimmon.server.engine.scheduler import Scheduler
from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.shares import Holdings

_age = attrgetter("age")


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
    """A list that gets the scheduler's preemptions from now on.

    Block tables do not show them all: a sequence that comes straight back may get the blocks that it gave up.
    """
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


def check_preemption(
    preemption: Preemption, done: Mapping[Sequence, int], live: Collection[Sequence], whole: Holdings
) -> None:
    """Checks that the right sequence was preempted.

    Args:
        preemption: what happened.
        done: of each sequence, how many tokens were computed before the plan.
        live: all that have not finished.
        whole: what all may hold.
    """
    victim = preemption.victim
    everyone = [(victim, preemption.blocks), *preemption.others]
    slots, blocks = Counter[str](), Counter[str]()
    for own, count in everyone:
        slots[own.owner] += preemption.samples[own]
        blocks[own.owner] += count
    weights = {own.owner: own.weight for own in live}
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
        of_slots = (slots[owner] + more_slots) / whole.sequences
        return max(of_slots, (blocks[owner] + more_blocks) / whole.blocks) / weights[owner]

    newcomers = {own.owner for own in live if own.owner != victim.owner and own.priority <= victim.priority}
    left = part(victim.owner, -preemption.samples[victim], -preemption.blocks)
    assert any(part(owner, 1, 0) <= left for owner in newcomers), "no other client has less than its share"
