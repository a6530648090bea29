"""Sequences that wait for blocks: which of them is next.

A lower priority goes first, within a priority the client that has been served least, and of one client's sequences the
oldest.  Every AGEING_TURN-th admission ignores priorities, so that the more urgent sequences that overtake another one
are bounded in number.  Knows nothing of blocks, and has no clock.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ordered
from heapq import merge
from operator import attrgetter
from typing import Any

from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.shares import Share

AGEING_TURN = 4
"""One admission in this many goes to the oldest sequence of the client served least, whatever its priority."""

_rank = attrgetter("rank")
_age = attrgetter("age")


class WaitingQueue:
    """Waiting sequences, each of which may lead forks."""

    def __init__(self) -> None:
        # Every client that was ever seen; there are as many as API keys.
        self._shares: dict[str, Share] = {}
        # Of each client with waiting sequences all of them, by rank and by age.
        self._by_rank: dict[Share, list[Sequence]] = {}
        self._by_age: dict[Share, list[Sequence]] = {}
        self._count = 0
        self._admissions = 0
        self._joins = 0
        # Where a client begins that comes while no other waits.
        self._level = 0.0

    def __len__(self) -> int:
        return self._count

    @property
    def contended(self) -> bool:
        """Whether more than one client has been seen."""
        return len(self._shares) > 1

    @property
    def counts(self) -> dict[Share, int]:
        """For each client with waiting sequences, how many it has; forks do not count."""
        return {share: len(queue) for share, queue in self._by_rank.items()}

    def share_of(self, name: str, weight: int) -> Share:
        """The share of a client.

        Args:
            name: the client's.
            weight: its present weight.
        """
        share = self._shares.get(name)
        if share is None:
            share = self._shares[name] = Share(name, weight)
        share.weight = weight
        return share

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence in its place."""
        share = sequence.share
        if share not in self._by_rank:
            # Time in which a client wanted nothing earns it nothing.
            share.served = max(share.served, min([own.served for own in self._by_rank], default=self._level))
            self._joins += 1
            share.joined = self._joins
            self._by_rank[share], self._by_age[share] = [], []
        insort(self._by_rank[share], sequence, key=_rank)
        insort(self._by_age[share], sequence, key=_age)
        self._count += 1

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out that is not to be admitted."""
        share = sequence.share
        _take(self._by_rank[share], sequence, _rank)
        _take(self._by_age[share], sequence, _age)
        if not self._by_rank[share]:
            del self._by_rank[share], self._by_age[share]
        self._count -= 1

    def replace(self, sequence: Sequence, successor: Sequence) -> None:
        """Puts a fork in the place of its leader."""
        self.remove(sequence)
        self.add(successor)

    def admit(self, sequence: Sequence, tokens: int) -> None:
        """Takes a sequence out that has got blocks, and charges its client.

        Args:
            sequence: which was among the first of `in_order`.
            tokens: of its prompt that have to be computed; 0 for one that comes back.
        """
        self.remove(sequence)
        self._admissions += 1
        sequence.share.charge(tokens)
        self._level = max(self._level, sequence.share.served)

    def in_order(self) -> Iterator[Sequence]:
        """All waiting sequences, the next one first; void when one is added or taken out."""
        # A client that joins begins level with the one served least.  It goes first: the other has sequences that run.
        if self._admissions % AGEING_TURN == AGEING_TURN - 1:
            return _merged(list(self._by_age.values()), lambda own: (own.share.served, -own.share.joined, own.age))
        return _merged(
            list(self._by_rank.values()), lambda own: (own.priority, own.share.served, -own.share.joined, own.age)
        )


def _merged(queues: Ordered[list[Sequence]], key: Callable[[Sequence], Any]) -> Iterator[Sequence]:
    return iter(queues[0]) if len(queues) == 1 else merge(*queues, key=key)


def _take(queue: list[Sequence], sequence: Sequence, key: Callable[[Sequence], Any]) -> None:
    del queue[bisect_left(queue, key(sequence), key=key)]
