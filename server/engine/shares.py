"""What each client has had of the engine, and what it holds.

A client is one API key; a server without keys has one client.  Service is counted in tokens, as in "Fairness in Serving
Large Language Models" (Sheng et al., OSDI 2024): the client that has had least goes first, and one that comes back from
a pause has saved nothing up.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from persimmon.server.engine.sequence import Sequence


@dataclass(eq=False, slots=True)
class Share:
    """One client's share of the engine.

    Attributes:
        name: the client's; empty where the server knows no clients.
        weight: a client of weight 2 gets twice as much as one of weight 1.
        served: tokens computed for it and generated, divided by its weight.
        joined: a number that grows with each time that a client begins to wait while it had nothing waiting.
    """

    name: str = ""
    weight: int = 1
    served: float = 0.0
    joined: int = 0

    def charge(self, tokens: int) -> None:
        """Counts tokens that it got."""
        self.served += tokens / self.weight


NO_SHARE = Share()
"""The share of sequences that no scheduler has taken yet."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """What one client's running sequences hold.

    Attributes:
        sequences: how many they are, pending forks included.
        blocks: entries of their block tables; a block that two of them share counts twice.
    """

    sequences: int = 0
    blocks: int = 0

    def plus(self, sequences: int, blocks: int) -> "Holdings":
        """The same with more; negative numbers are less."""
        return Holdings(self.sequences + sequences, self.blocks + blocks)

    def part(self, of: "Holdings", weight: int) -> float:
        """The larger part of the two resources, divided by the client's weight (dominant resource fairness)."""
        return max(self.sequences / of.sequences, self.blocks / of.blocks) / weight


def holdings(running: "Iterable[Sequence]") -> dict[Share, Holdings]:
    """What each client with running sequences holds."""
    sequences: dict[Share, int] = {}
    blocks: dict[Share, int] = {}
    for own in running:
        share = own.share
        sequences[share] = sequences.get(share, 0) + 1 + len(own.forks)
        blocks[share] = blocks.get(share, 0) + len(own.block_table)
    return {share: Holdings(count, blocks[share]) for share, count in sequences.items()}
