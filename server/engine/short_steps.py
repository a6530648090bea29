"""Steps for clients with little work, between the steps for all.

A step takes as long as all its sequences take, so one client's 255 sequences would make another's four tokens take four
long steps.  Instead, several short steps without the 255 run after each long one.  Decides which clients a short step
is for and how long it may take; knows neither blocks nor tokens.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Ordered
from typing import NamedTuple

from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.shares import Share
from persimmon.server.engine.step_cost import StepCosts
from persimmon.server.engine.waiting import WaitingQueue

SHORT_SHARE = 0.25
"""Short steps between two full ones may take this share of the time that the full one takes."""

MAX_SHORT_STEPS = 8
"""Maximum number of short steps between two full ones: each costs more than what it computes."""


def clients_with_little(running: Iterable[Sequence], waiting: Mapping[Share, int]) -> frozenset[Share]:
    """The clients that short steps are for.

    They have less than their part of all sequences, by weight, while another client has more than its part, some of
    which wait.  None where no client does.

    Args:
        running: sequences that hold blocks.
        waiting: for each client with sequences that wait, how many do.
    """
    counts = Counter([own.share for own in running])
    counts.update(waiting)
    part = counts.total() / sum([share.weight for share in counts])
    if all(counts[share] <= part * share.weight for share in waiting):
        return frozenset()
    return frozenset(share for share, count in counts.items() if count < part * share.weight)


class ShortStep(NamedTuple):
    """A step that leaves clients out.

    Attributes:
        clients: whose sequences are in it.
        prompt_seconds: time that it has for prompts.
    """

    clients: frozenset[Share]
    prompt_seconds: float


class ShortSteps:
    """The time that is left for short steps until the next full one."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._steps = 0

    @property
    def seconds(self) -> float:
        """The time that the next short step may take; 0 where the next step is for all."""
        return self._seconds if self._steps else 0.0

    def next(self, running: Ordered[Sequence], waiting: WaitingQueue, costs: StepCosts) -> ShortStep | None:
        """The short step to run now; None where the next step is for all.

        Args:
            running: sequences that hold blocks.
            waiting: sequences that wait.
            costs: what steps cost.
        """
        seconds = self.seconds
        if seconds <= costs.step or not waiting:
            return None
        clients = clients_with_little(running, waiting.counts)
        own = [sequence for sequence in running if sequence.share in clients]
        joins = next(waiting.in_order()).share in clients
        quiet = costs.step + sum([costs.decode + costs.decode_context * one.num_computed for one in own])
        if not (own or joins) or seconds <= quiet:
            return None
        return ShortStep(clients, seconds - quiet - costs.chunks)

    def count_full(self, seconds: float, longest: float | None) -> None:
        """Records a full step.

        Args:
            seconds: that it takes.
            longest: limit on the time between two tokens of a sequence; None where there is none.
        """
        self._steps = MAX_SHORT_STEPS
        self._seconds = SHORT_SHARE * seconds
        if longest is not None:
            self._seconds = min(self._seconds, longest - seconds)

    def count_short(self, seconds: float) -> None:
        """Records a short step and the time that it takes."""
        self._steps -= 1
        self._seconds = max(0.0, self._seconds - seconds)
