"""Random inputs of the kernels, in the network's shapes, for checks and for timing.

Knows what the kernels take; calls none of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from persimmon.kernels.layer_norm import STATISTICS_COLUMNS
from persimmon.kernels.operands import LayerCache, Rotary
from persimmon.model.config import PersimmonConfig
from persimmon.model.rotary import rotary_table


@dataclass(frozen=True, slots=True)
class Pages:
    """A layer's cache and who owns what of it.

    Attributes:
        keys, values: [N, H, S, D].
        tables: blocks of each sequence, no block in two of them, in random order.
        spare: a block that no sequence uses.
    """

    keys: torch.Tensor
    values: torch.Tensor
    tables: list[list[int]]
    spare: int

    @property
    def cache(self) -> LayerCache:
        """As kernels take it."""
        return LayerCache(self.keys, self.values)

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.keys.shape[2]

    def table_tensor(self, sequences: Sequence[int] | None = None) -> torch.Tensor:
        """[B, W] int32 of these sequences, or of all; behind a sequence's blocks stands the spare one."""
        chosen = self.tables if sequences is None else [self.tables[index] for index in sequences]
        width = max(map(len, chosen))
        rows = [[*table, *[self.spare] * (width - len(table))] for table in chosen]
        return torch.tensor(rows, dtype=torch.int32, device=self.keys.device)

    def clone(self) -> "Pages":
        """A copy that may be written to."""
        return replace(self, keys=self.keys.clone(), values=self.values.clone())


def make_pages(
    config: PersimmonConfig,
    lengths: Sequence[int],
    block_size: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    poisoned: bool = False,
    filled: Sequence[int] | None = None,
) -> Pages:
    """A cache with room for sequences of these lengths, in shuffled blocks.

    Args:
        config: the network.
        lengths: tokens that each sequence has room for.
        block_size: of the cache.
        dtype: of the cache.
        generator: of the values and of the order of blocks.
        poisoned: whether everything that no sequence has filled is NaN, and one extra block belongs to no sequence.
        filled: how many tokens of each sequence hold values, when poisoned.
    """
    needed = [-(-length // block_size) for length in lengths]
    blocks = sum(needed) + 1
    shape = (blocks, config.num_attention_heads, block_size, config.head_dim)
    device = generator.device
    keys, values = (torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator) for _ in range(2))
    order = torch.randperm(blocks, generator=generator, device=device).tolist()
    tables = []
    for need in needed:
        tables.append(order[:need])
        order = order[need:]
    pages = Pages(keys, values, tables, spare=order[0])
    if poisoned:
        _poison(pages, lengths if filled is None else filled)
    return pages


def _poison(pages: Pages, filled: Sequence[int]) -> None:
    size = pages.block_size
    for cache in (pages.keys, pages.values):
        cache[pages.spare] = float("nan")
        for table, count in zip(pages.tables, filled, strict=True):
            whole, rest = divmod(count, size)
            if whole < len(table):
                cache[table[whole], :, rest:] = float("nan")
            for block in table[whole + 1 :]:
                cache[block] = float("nan")


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """What the attention kernels take in addition to the cache.

    Attributes:
        qkv: [T, H, 3, D].
        norm_weight, norm_bias: [2, D].
        eps: of the LayerNorms.
        rotary: the angles of all positions.
    """

    qkv: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    eps: float
    rotary: Rotary

    @property
    def norm_and_rotary(self) -> tuple[torch.Tensor, torch.Tensor, float, torch.Tensor, torch.Tensor]:
        """What kernels take between qkv and the cache."""
        return self.norm_weight, self.norm_bias, self.eps, self.rotary.cos, self.rotary.sin


def make_attention_inputs(
    config: PersimmonConfig, tokens: int, dtype: torch.dtype, generator: torch.Generator
) -> AttentionInputs:
    """Random queries, keys and values, and norms that are not the identity."""
    heads, dim, device = config.num_attention_heads, config.head_dim, generator.device

    def normal(*shape: int, deviation: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(mean, deviation, generator=generator)

    return AttentionInputs(
        qkv=normal(tokens, heads, 3, dim),
        # As the network keeps them.
        norm_weight=normal(2, dim, deviation=0.1, mean=1.0).float(),
        norm_bias=normal(2, dim, deviation=0.1).float(),
        eps=config.layer_norm_eps,
        rotary=rotary_table(config, device),
    )


@dataclass(frozen=True, slots=True)
class Width:
    """A projection by its name and widths."""

    name: str
    in_features: int
    out_features: int


def widths(config: PersimmonConfig) -> list[Width]:
    """The projections of a layer."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    return [
        Width("query_key_value", hidden, 3 * hidden),
        Width("attention_out", hidden, hidden),
        Width("mlp_up", hidden, intermediate),
        Width("mlp_down", intermediate, hidden),
    ]


def normal(
    generator: torch.Generator, *shape: int, dtype: torch.dtype, mean: float = 0.0, deviation: float = 1.0
) -> torch.Tensor:
    """Normal numbers on the generator's device."""
    return torch.empty(shape, dtype=dtype, device=generator.device).normal_(mean, deviation, generator=generator)


def planted_activation(
    generator: torch.Generator, rows: int, width: int, zeros: float, *, shared: bool, dtype: torch.dtype
) -> torch.Tensor:
    """[rows, width] like a squared ReLU's output, of which a share is zero.

    Args:
        generator: of the numbers and of the places.
        rows, width: the shape.
        zeros: share of zeros.
        shared: whether all rows are zero in the same places.
        dtype: of the numbers.
    """
    places = torch.rand((1 if shared else rows, width), device=generator.device, generator=generator) < zeros
    values = normal(generator, rows, width, dtype=torch.float32).square().add_(2.0**-6)
    return values.masked_fill_(places, 0.0).to(dtype)


def row_statistics(x: torch.Tensor) -> torch.Tensor:
    """[M, hidden] to [2, tiles, M] float32: mean and squared deviations of every 64 columns, as `embed` leaves them."""
    tiles = x.float().view(len(x), -1, STATISTICS_COLUMNS)
    means = tiles.mean(2)
    squares = (tiles - means[:, :, None]).square().sum(2)
    return torch.stack((means.t(), squares.t())).contiguous()
