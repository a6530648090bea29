"""The inputs of a step of single tokens and chunks of prompts in one buffer, so that one transfer brings them.

A step's tokens lie one after the other: single ones first, padding last.  Which of them belong to which sequence is in
the buffer and not in the launches, so the same launches serve every step of no more tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from persimmon.kernels.chunk_plan import ChunkPlan, ChunkTiles, PrefillConfig, lay_out_chunks
from persimmon.model.runner import SequenceInput
from persimmon.model.step_inputs import write_tables

MAX_CHUNKS = 8
"""Most chunks of a step."""

_ALIGNMENT = 4
"""Every field begins at a multiple of this number of words: kernels are compiled for pointers aligned to 16 bytes."""


def max_chunks(tokens: int) -> int:
    """Most chunks of a step of that many tokens; a graph has programs for all of them, with or without work."""
    return MAX_CHUNKS if tokens > 64 else MAX_CHUNKS // 2


@dataclass(frozen=True, slots=True)
class MixedInputs:
    """The inputs of a step of T tokens, as views into a `MixedBuffer`; C is `MAX_CHUNKS`.

    Attributes:
        token_ids: [T] int64; a negative one, -1 - r, stands for the r-th token of the step before.
        rows: [*] int64, the tokens whose states are wanted.
        lengths: [B] int32, context of each single token, itself included; 0 for other rows.
        live: [1] int32, tokens that are not padding.
        chunks: of all T tokens; its sequences are C + 1, of which the last never has a token.
    """

    token_ids: torch.Tensor
    rows: torch.Tensor
    lengths: torch.Tensor
    live: torch.Tensor
    chunks: ChunkPlan


class MixedBuffer:
    """Room for a mixed step's inputs, field after field, in int32 words; then block tables, as wide as the step needs.

    Args:
        max_tokens: of the largest step.
        max_rows: most sequences of a step.
        max_blocks: blocks of the longest sequence.
        configs: the tile shapes of chunks.
        device: where the buffer is.
        pinned: whether this is host memory for asynchronous transfers.
    """

    def __init__(
        self,
        max_tokens: int,
        max_rows: int,
        max_blocks: int,
        configs: Sequence[PrefillConfig],
        device: torch.device,
        *,
        pinned: bool = False,
    ) -> None:
        self._max_rows = max_rows
        self._configs = configs
        tiles = [2 * self._tiles(max_tokens, config) for config in configs]
        sizes = {
            "token_ids": 2 * max_tokens,
            "slots": 2 * max_tokens,
            "rows": 2 * (max_tokens + max_rows),
            "positions": max_tokens,
            "lengths": max_rows,
            "live": 1,
            "query_starts": MAX_CHUNKS + 2,
            "starts": MAX_CHUNKS + 1,
            **{f"tiles {place}": size for place, size in enumerate(tiles)},
        }
        ends = list(accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes.values()))
        self._fields = {
            name: slice(begin, begin + size) for (name, size), begin in zip(sizes.items(), [0, *ends[:-1]], strict=True)
        }
        self._tables_at = ends[-1]
        tables = (MAX_CHUNKS + 1 + max_rows) * max_blocks
        self.words = torch.zeros(self._tables_at + tables, dtype=torch.int32, device=device, pin_memory=pinned)

    def size(self, tables: int, width: int) -> int:
        """Words that travel with that many block tables of `width` blocks."""
        return self._tables_at + tables * width

    def block_tables(self, tables: int, width: int) -> torch.Tensor:
        """[tables, width] int32: those of C + 1 chunks, then those of single tokens."""
        return self.words[self._tables_at : self.size(tables, width)].view(tables, width)

    def inputs(self, tokens: int, block_tables: torch.Tensor) -> MixedInputs:
        """The views for a step of `tokens`, whose chunks' block tables are given."""
        starts = self._field("starts")
        return MixedInputs(
            token_ids=self._field("token_ids").view(torch.int64)[:tokens],
            rows=self._field("rows").view(torch.int64),
            lengths=self._field("lengths")[:tokens],
            live=self._field("live"),
            chunks=ChunkPlan(
                positions=self._field("positions")[:tokens],
                slots=self._field("slots").view(torch.int64)[:tokens],
                block_tables=block_tables[: len(starts)],
                query_starts=self._field("query_starts"),
                starts=starts,
                # The longest first, as in `plan_chunks`.
                launches=tuple(
                    ChunkTiles(config, self._field(f"tiles {place}").view(-1, 2)[: self._tiles(tokens, config)])
                    for place, config in reversed(list(enumerate(self._configs)))
                ),
            ),
        )

    def _field(self, name: str) -> torch.Tensor:
        return self.words[self._fields[name]]

    def _tiles(self, tokens: int, config: PrefillConfig) -> int:
        """As many as the chunks of a step can need: all but the last shape are for chunks of one tile."""
        whole = tokens // config.block_queries if config == self._configs[-1] else 0
        return max_chunks(tokens) + whole


def write_mixed(
    buffer: MixedBuffer,
    batch: Sequence[SequenceInput],
    rows: Sequence[int],
    tokens: int,
    block_size: int,
    configs: Sequence[PrefillConfig],
) -> tuple[int, int]:
    """Writes a step into a host buffer.

    Args:
        buffer: is written.
        batch: sequences with one token come first.
        rows: the tokens whose states are wanted.
        tokens: at least as many as the batch has; those behind it are padding.
        block_size: of the cache.
        configs: the tile shapes of chunks.

    Returns:
        How many block tables there are, and their width.
    """
    decodes = next((place for place, item in enumerate(batch) if len(item.token_ids) != 1), len(batch))
    chunks = batch[decodes:]
    width = max((len(item.block_table) for item in batch), default=0)
    tables = buffer.block_tables(MAX_CHUNKS + 1 + decodes, width)
    inputs = buffer.inputs(tokens, tables)
    plan = inputs.chunks
    token_ids = [token for item in batch for token in item.token_ids]
    inputs.token_ids.numpy()[: len(token_ids)] = token_ids
    inputs.rows.numpy()[: len(rows)] = rows
    inputs.live[0] = len(token_ids)
    lengths, slots, positions = inputs.lengths.numpy(), plan.slots.numpy(), plan.positions.numpy()
    lengths[:decodes] = [item.start + 1 for item in batch[:decodes]]
    lengths[decodes:] = 0
    slots[:] = -1
    positions[:] = 0
    starts, query_starts = plan.starts.numpy(), plan.query_starts.numpy()
    starts[:] = 0
    query_starts[:] = len(token_ids)
    for launch in plan.launches:
        launch.tiles.numpy()[:] = MAX_CHUNKS, 0
    if chunks:
        laid_out = lay_out_chunks(
            [item.block_table for item in chunks],
            [item.start for item in chunks],
            [len(item.token_ids) for item in chunks],
            block_size=block_size,
            configs=configs,
        )
        slots[decodes : len(token_ids)] = laid_out.slots
        positions[decodes : len(token_ids)] = laid_out.positions
        starts[: len(chunks)] = laid_out.starts
        query_starts[: len(chunks) + 1] = laid_out.query_starts + decodes
        for launch, tiles in zip(plan.launches, reversed(laid_out.tiles), strict=True):
            launch.tiles.numpy()[: len(tiles)] = tiles
    write_tables(tables[: len(chunks)], [item.block_table for item in chunks])
    write_tables(tables[MAX_CHUNKS + 1 :], [item.block_table for item in batch[:decodes]])
    return len(tables), width
