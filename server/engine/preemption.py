"""Which running sequence gives its blocks up, when there are too few of them or another client has less than its share.

Knows what sequences hold; takes nothing from them.
"""

from collections.abc import Sequence as Ordered
from operator import attrgetter

from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.shares import Holdings, holdings

_age = attrgetter("age")


def lost_least(running: Ordered[Sequence]) -> Sequence:
    """The sequence to preempt when blocks run short.

    Of the lowest priority that runs, and there of the client that holds most for its weight, the one that has computed
    least and, among equals, the newest.  The oldest of all is never preempted, so that it ends.

    Args:
        running: two or more, by rank.
    """
    oldest = min(running, key=_age)
    others = [sequence for sequence in reversed(running) if sequence is not oldest]
    lowest = others[0].priority
    candidates = [sequence for sequence in others if sequence.priority == lowest]
    if len({sequence.share for sequence in candidates}) > 1:
        held = holdings(running)
        most = max([own.share for own in candidates], key=lambda share: held[share].blocks / share.weight)
        candidates = [sequence for sequence in candidates if sequence.share is most]
    return min(candidates, key=attrgetter("num_computed"))


def owed_to(newcomer: Sequence, needed: int, running: Ordered[Sequence], whole: Holdings) -> Sequence | None:
    """The sequence that gives way to a waiting one, because its client holds more than its share.

    Without it that client still holds no less, for its weight, than the newcomer's would with the newcomer: neither can
    put off the other in turn.  It is of the client that holds most, of its least urgent priority, and has computed
    least.  Sequences more urgent than the newcomer, and each client's oldest, are not preempted.

    Args:
        newcomer: waits.
        needed: blocks that it needs.
        running: in any order.
        whole: what all clients together may hold.

    Returns:
        None where no client holds more than its share.
    """
    share = newcomer.share
    if all(own.share is share for own in running):
        return None
    held = holdings(running)
    least = held.pop(share, Holdings()).plus(1, needed).part(whole, share.weight)
    most = max(held, key=lambda other: held[other].part(whole, other.weight))
    _, *newer = sorted([own for own in running if own.share is most], key=_age)
    candidates = [
        own
        for own in newer
        if own.priority >= newcomer.priority
        and held[most].plus(-1 - len(own.forks), -len(own.block_table)).part(whole, most.weight) >= least
    ]
    return min(candidates, key=lambda own: (-own.priority, own.num_computed, -own.arrival), default=None)
