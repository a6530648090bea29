"""One sequence: its tokens, its stop rules, where its keys and values are."""

from collections.abc import Hashable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from server.engine.blocks import ROOT_HASH, hash_block
from server.engine.messages import Sampling


@dataclass(eq=False, slots=True)
class Sequence:
    """A prompt and what has been generated for it so far.

    Attributes:
        key: who asked for it; unique among live sequences.
        token_ids: prompt and output, in order.
        prompt_length: how many of them are the prompt.
        max_tokens: most output tokens.
        stop_token_ids: an output token among these is the last.
        sampling: passed on to the runner unread.
        num_computed: the first so many tokens have their keys and values in the blocks.
        block_table: the blocks that hold them, in order.
        cached_tokens: prompt tokens found in the prefix cache at the first admission; None before it.
        finish_reason: None while it lives, else "stop", "length" or "abort".
    """

    key: Hashable
    token_ids: list[int]
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)
    prompt_length: int = field(init=False)
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    cached_tokens: int | None = None
    finish_reason: str | None = None
    _block_hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens known so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.prompt_length

    @property
    def num_uncomputed(self) -> int:
        """Known tokens without keys and values yet; 1 while decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def finished(self) -> bool:
        """Whether it will get no more tokens."""
        return self.finish_reason is not None

    def block_hashes(self, count: int, block_size: int) -> Ids[bytes]:
        """The chain of hashes of its first `count` blocks, which must be full of known tokens."""
        hashes = self._block_hashes
        while len(hashes) < count:
            start = len(hashes) * block_size
            parent = hashes[-1] if hashes else ROOT_HASH
            hashes.append(hash_block(parent, self.token_ids[start : start + block_size]))
        return hashes[:count]

    def append(self, token_id: int) -> bool:
        """Takes the next sampled token and applies the stop rules; whether it was the last."""
        self.token_ids.append(token_id)
        if token_id in self.stop_token_ids:
            self.finish_reason = "stop"
        elif self.num_output_tokens >= self.max_tokens:
            self.finish_reason = "length"
        return self.finished
