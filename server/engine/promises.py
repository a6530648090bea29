"""Which full blocks running sequences are about to compute, so that others with the same prefix can wait for them.

Knows no pool.
"""

from persimmon.server.engine.sequence import Sequence


class Promises:
    """Blocks that will be computed, by their hashes, and the sequence that will compute each.

    Args:
        block_size: tokens in a block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._by_hash: dict[bytes, Sequence] = {}

    def __len__(self) -> int:
        return len(self._by_hash)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._by_hash

    def make(self, sequence: Sequence, first: int) -> None:
        """Announces the full blocks that a sequence will compute, from its block number `first` on."""
        size = self._block_size
        for block_hash in sequence.block_hashes(sequence.num_tokens // size, size)[first:]:
            self._by_hash.setdefault(block_hash, sequence)

    def keep(self, block_hash: bytes) -> None:
        """Takes note that a block has been computed."""
        self._by_hash.pop(block_hash, None)

    def withdraw(self, sequence: Sequence, successor: Sequence | None = None) -> None:
        """Withdraws the blocks that a sequence promised to compute, or hands the promise to `successor`."""
        if not self._by_hash:
            return
        size = self._block_size
        for block_hash in sequence.block_hashes(sequence.num_tokens // size, size):
            if self._by_hash.get(block_hash) is sequence:
                if successor is None:
                    del self._by_hash[block_hash]
                else:
                    self._by_hash[block_hash] = successor
