"""The KV block pool: which blocks are free, who holds the others, and which prompt prefixes they still contain.

Knows block numbers and hashes, not tensors: the runner handles the content of a block.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from hashlib import blake2b
from struct import Struct

ROOT_HASH = b""
"""The parent of a sequence's first block, unless a salt keeps it apart; a salt never has a hash's 32 bytes."""

HASH_BYTES = 32


def hash_block(parent: bytes, token_ids: Sequence[int], spans: bytes = b"") -> bytes:
    """The identity of a full block: these tokens after that prefix.

    A 256-bit cryptographic hash, because a collision would hand one user the context of another.  It is the same in
    all processes of a machine.

    Args:
        parent: hash of the block before it; of the first one ROOT_HASH, or a salt.
        token_ids: all tokens of the block, of which a pool's blocks have equally many.
        spans: where in the block something else than the tokens' embeddings stands, and what.
    """
    return blake2b(array("i", token_ids).tobytes() + spans, digest_size=HASH_BYTES, key=parent).digest()


@cache
def _packing(block_size: int) -> Callable[..., bytes]:
    """Makes the tokens of a block the bytes that `hash_block` hashes, in a third of an array's time."""
    return Struct(f"{block_size}i").pack


def block_hashes(
    token_ids: Sequence[int],
    block_size: int,
    parent: bytes = ROOT_HASH,
    spans: Callable[[int, int], bytes] | None = None,
) -> Iterator[bytes]:
    """What `hash_block` makes of each full block of a prompt, one block after the other.

    Args:
        token_ids: the prompt.
        block_size: tokens in a block.
        parent: of the first block.
        spans: what `hash_block` gets for the block between two of its tokens; None for nothing.
    """
    pack = _packing(block_size)
    for begin in range(0, len(token_ids) - block_size + 1, block_size):
        tokens = pack(*token_ids[begin : begin + block_size])
        if spans is not None:
            tokens += spans(begin, begin + block_size)
        parent = blake2b(tokens, digest_size=HASH_BYTES, key=parent).digest()
        yield parent


def salted_with_length(salt: bytes, length: int) -> bytes:
    """A salt for prompts of one length, which share blocks only with each other.

    Args:
        salt: that stood before the first block until now.
        length: tokens of the prompt.
    """
    return blake2b(length.to_bytes(8, "little"), digest_size=24, key=salt).digest()


class BlockPool:
    """Reference-counted blocks with a prefix index over the full ones.

    A block that no sequence holds is free.  A free block keeps its content, and its place in the prefix index, until it
    is allocated again; the block freed longest ago goes first.

    Args:
        num_blocks: blocks in the pool, numbered from 0.
        block_size: tokens in a block.
        prefix_caching: whether full blocks are indexed at all.
        tracks_changes: whether `take_changes` is called after each step.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, prefix_caching: bool = True, tracks_changes: bool = False
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool of {num_blocks} blocks of {block_size} tokens; both must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        # Insertion order is the order of eviction.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._block_of_hash: dict[bytes, int] = {}
        self._hash_of_block: dict[int, bytes] = {}
        # Hashes that have entered or left the index since that was last asked for, and whether they are in it now.
        self._changes: dict[bytes, bool] | None = {} if tracks_changes else None

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """The number of blocks that `tokens` tokens fill or begin."""
        return -(-num_tokens // self.block_size)

    def is_free(self, block: int) -> bool:
        """Whether no sequence holds this block."""
        return self._references[block] == 0

    def references(self, block: int) -> int:
        """How many sequences hold this block."""
        return self._references[block]

    def is_shared(self, block: int) -> bool:
        """Whether more than one sequence holds this block."""
        return self._references[block] > 1

    def allocate(self, count: int) -> list[int]:
        """Takes free blocks, each with one reference; what they cached is forgotten.

        Raises:
            ValueError: fewer are free.  Callers look at `num_free` first.
        """
        if count > len(self._free):
            raise ValueError(f"{count} blocks requested, but only {len(self._free)} are free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
            block_hash = self._hash_of_block.pop(block, None)
            if block_hash is not None:
                del self._block_of_hash[block_hash]
                if self._changes is not None:
                    self._changes[block_hash] = False
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a reference to each block, taking it off the free list where it was there."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Gives back one reference to each block of a sequence's table.

        The last block is queued for eviction first: a prefix is worth more the shorter it is.
        """
        for block in reversed(blocks):
            if self._references[block] == 0:
                raise ValueError(f"block {block} was released more often than it was taken")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks that hold the longest known prefix of this chain of hashes.  Takes no reference."""
        blocks: list[int] = []
        for block_hash in hashes:
            block = self._block_of_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def index(self, block: int, block_hash: bytes) -> None:
        """Makes a held block whose tokens are all computed findable.

        When two sequences computed the same prefix side by side, the first block indexed stays the findable one.
        """
        if self.prefix_caching and block_hash not in self._block_of_hash and block not in self._hash_of_block:
            self._block_of_hash[block_hash] = block
            self._hash_of_block[block] = block_hash
            if self._changes is not None:
                self._changes[block_hash] = True

    @property
    def indexed(self) -> Iterable[bytes]:
        """The hashes of all blocks that `lookup` finds."""
        return self._block_of_hash.keys()

    def take_changes(self) -> Mapping[bytes, bool]:
        """The hashes that have entered or left the index since the last call; whether each is in it now."""
        changes = self._changes
        if not changes:
            return {}
        self._changes = {}
        return changes
