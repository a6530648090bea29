"""Where the tokens of a step's prompt chunks go and what they attend to, as tensors made once a step.

Knows tile shapes, but no kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from persimmon.kernels.launch import upload


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """One tile shape of the attention kernel.

    Attributes:
        block_queries: tokens of a chunk that one program takes, a power of two from 16.
        block_keys: cached tokens of one turn of its loop, a power of two from 16.
        warps: of a program.
        stages: of the loop's pipeline, stages - 1 tiles of K and V being on their way.
    """

    block_queries: int
    block_keys: int
    warps: int
    stages: int


CONFIGS = (
    PrefillConfig(block_queries=16, block_keys=64, warps=4, stages=3),
    PrefillConfig(block_queries=128, block_keys=64, warps=8, stages=3),
)
"""For drafts to verify and for prompts, of 16-bit elements; chosen from machine code, not yet run on a GPU."""

FLOAT32_CONFIGS = (
    PrefillConfig(block_queries=16, block_keys=32, warps=8, stages=2),
    PrefillConfig(block_queries=32, block_keys=32, warps=4, stages=2),
)
"""The same for float32, which the tensor cores do not multiply: what fits a thread's registers."""


@dataclass(frozen=True, slots=True)
class ChunkTiles:
    """The work of one launch.

    Attributes:
        config: the tile shape.
        tiles: [n, 2] int32, each tile's sequence and the index of its first query in that sequence's chunk; those
            with the most keys first, so that no long tile starts when the others end.
    """

    config: PrefillConfig
    tiles: torch.Tensor


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """Where the chunks' tokens go and what they attend to; made once a step, used by every layer.

    All tensors are views of one, and each begins at 16 bytes: Triton compiles anew for a pointer that does not.

    Attributes:
        positions: [T] int32, each token's place in its sequence.
        slots: [T] int64, block * S + offset in the block; negative where the token has none, because it is padding or
            belongs to no chunk: its key and value are not stored.
        block_tables: [C, W] int32; what lies behind a sequence's last block is 0.
        query_starts: [C + 1] int32, where each sequence's tokens begin in the step; the last entry is T.
        starts: [C] int32, the position of each sequence's first token, which is the length of its cached context.
        launches: the attention kernel's, longest tiles first.  A tile of a sequence without tokens does nothing.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    block_tables: torch.Tensor
    query_starts: torch.Tensor
    starts: torch.Tensor
    launches: tuple[ChunkTiles, ...]


@dataclass(frozen=True, slots=True)
class LastTokens:
    """The last token of each of B sequences: a decode step's.

    Attributes:
        lengths: [B] int32, tokens of each sequence, this one included; 0 for padding.
        block_tables: [B, W] int32.
    """

    lengths: torch.Tensor
    block_tables: torch.Tensor


@dataclass(frozen=True, slots=True)
class HostChunkPlan:
    """A `ChunkPlan` on the host.

    Attributes:
        positions, slots: [T] int64.
        block_tables: [C, W] int64.
        query_starts: [C + 1] int64.
        starts: [C] int64.
        tiles: for each tile shape, in the order given, [n, 2] int64; n may be 0.
    """

    positions: np.ndarray
    slots: np.ndarray
    block_tables: np.ndarray
    query_starts: np.ndarray
    starts: np.ndarray
    tiles: tuple[np.ndarray, ...]


def prefill_configs(dtype: torch.dtype) -> tuple[PrefillConfig, ...]:
    """The tile shapes for a cache of this type, by rising `block_queries`."""
    return FLOAT32_CONFIGS if dtype == torch.float32 else CONFIGS


def plan_chunks(
    block_tables: Sequence[Sequence[int]],
    starts: Sequence[int],
    counts: Sequence[int],
    *,
    block_size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float16,
    configs: Sequence[PrefillConfig] | None = None,
) -> ChunkPlan:
    """Turns C sequences' chunks into index tensors, with one copy to the device.

    Args:
        block_tables, starts, counts, block_size: as `lay_out_chunks` takes them.
        device: of the cache.
        dtype: of the cache, which decides the tile shapes unless `configs` does.
        configs: tile shapes by rising `block_queries`.
    """
    configs = prefill_configs(dtype) if configs is None else configs
    plan = lay_out_chunks(block_tables, starts, counts, block_size=block_size, configs=configs)
    launched = [(config, tiles) for config, tiles in zip(configs, plan.tiles, strict=True) if len(tiles)][::-1]
    parts = [plan.slots.view(np.int32), plan.positions, plan.block_tables, plan.query_starts, plan.starts]
    on_device = _pack([*parts, *(tiles for _, tiles in launched)], device)
    return ChunkPlan(
        positions=on_device[1],
        slots=on_device[0].view(torch.int64),
        block_tables=on_device[2],
        query_starts=on_device[3],
        starts=on_device[4],
        launches=tuple(ChunkTiles(config, tiles) for (config, _), tiles in zip(launched, on_device[5:], strict=True)),
    )


def lay_out_chunks(
    block_tables: Sequence[Sequence[int]],
    starts: Sequence[int],
    counts: Sequence[int],
    *,
    block_size: int,
    configs: Sequence[PrefillConfig],
) -> HostChunkPlan:
    """Turns C sequences' chunks into index arrays.

    The sequences' tokens lie one after the other in the step, in the order given.

    Args:
        block_tables: for each sequence, the blocks that hold its tokens, those of this step included.
        starts: position of each sequence's first token in this step.
        counts: how many tokens each has in this step.
        block_size: S of the cache.
        configs: tile shapes by rising `block_queries`.  A sequence takes the first that holds its chunk in one tile,
            or else the last: its own length decides, so that its bits do not depend on the rest of the step.
    """
    if not len(block_tables) == len(starts) == len(counts) > 0:
        raise ValueError(
            f"got {len(block_tables)} block tables, {len(starts)} starts and {len(counts)} counts: "
            "every sequence needs one of each, and a step needs a sequence"
        )
    start, count = np.asarray(starts, dtype=np.int64), np.asarray(counts, dtype=np.int64)
    if start.min() < 0 or count.min() < 1:
        raise ValueError(f"starts must be at least 0 and counts at least 1, got {list(starts)} and {list(counts)}")
    needed = -(-(start + count) // block_size)
    held = np.fromiter(map(len, block_tables), dtype=np.int64, count=len(block_tables))
    if (held < needed).any():
        short = int(np.argmax(held < needed))
        raise ValueError(
            f"sequence {short} of the step ends at {start[short] + count[short]} tokens, which take {needed[short]} "
            f"blocks of {block_size}; its table has {held[short]}"
        )

    bounds = np.concatenate(([0], np.cumsum(count)))
    owner = np.repeat(np.arange(len(count)), count)
    positions = np.arange(bounds[-1]) - (bounds[:-1] - start)[owner]
    tables = np.zeros((len(count), needed.max()), dtype=np.int64)
    used = (table[:need] for table, need in zip(block_tables, needed.tolist(), strict=True))
    tables[np.arange(needed.max()) < needed[:, None]] = np.fromiter(
        chain.from_iterable(used), dtype=np.int64, count=needed.sum()
    )
    slots = tables[owner, positions // block_size] * block_size + positions % block_size

    fits = np.searchsorted([config.block_queries for config in configs[:-1]], count)
    return HostChunkPlan(
        positions=positions,
        slots=slots,
        block_tables=tables,
        query_starts=bounds,
        starts=start,
        tiles=tuple(
            _tiles(np.flatnonzero(fits == index), start, count, config.block_queries)
            for index, config in enumerate(configs)
        ),
    )


def _tiles(sequences: np.ndarray, start: np.ndarray, count: np.ndarray, block_queries: int) -> np.ndarray:
    """[n, 2]: sequence and first query of every tile of these sequences, those that see most keys first."""
    num_tiles = -(-count[sequences] // block_queries)
    owner = np.repeat(sequences, num_tiles)
    behind = np.cumsum(num_tiles) - num_tiles
    first = (np.arange(len(owner)) - np.repeat(behind, num_tiles)) * block_queries
    keys = start[owner] + np.minimum(first + block_queries, count[owner])
    return np.stack((owner, first), axis=1)[np.argsort(-keys, kind="stable")]


def _pack(parts: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The arrays as int32 tensors on the device, copied at once; each begins at a multiple of 16 bytes."""
    ends = np.cumsum([-(-part.size // 4) * 4 for part in parts]).tolist()
    words = np.empty(ends[-1], dtype=np.int32)
    begins = [0, *ends[:-1]]
    for begin, part in zip(begins, parts, strict=True):
        words[begin : begin + part.size] = part.reshape(-1)
    packed = upload(words, device)
    return [packed[begin : begin + part.size].view(part.shape) for begin, part in zip(begins, parts, strict=True)]
