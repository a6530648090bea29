"""What projections have in common before and after their products: the norm, bias, activation, statistics, and splits.

Knows no weights.  Splits are summed in ascending order by whichever program arrives last.
"""

import torch
import triton
import triton.language as tl

from persimmon.kernels.layer_norm import (
    STATISTICS_COLUMNS,
    TILE_ROWS,
    layer_norm,
    relu_squared,
    statistics_shape,
    store_statistics,
)
from persimmon.kernels.projection_config import Norm

_MERGED_BLOCKS = tl.constexpr(4)
"""Row blocks of `TILE_ROWS` whose partial sums the last program of a tile reads at once."""


@triton.jit
def sum_splits(partials, rows, columns, mask, num_rows, OUT_FEATURES: tl.constexpr, SPLITS: tl.constexpr):
    """The splits' sums of [rows, columns], added in ascending order; read from the L2 cache, where others put them."""
    total = tl.zeros(mask.shape, tl.float32)
    for split in tl.static_range(SPLITS):
        places = partials + (split * num_rows + rows).to(tl.int64)[:, None] * OUT_FEATURES + columns[None, :]
        total += tl.load(places, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def add_terms(total, out, bias, rows, columns, mask, OUT_FEATURES: tl.constexpr, RESIDUAL: tl.constexpr):
    """Bias and residual on top of total [rows, columns] float32."""
    if bias is not None:
        # Read once for each row, from the L1 cache, because that is 16 bytes at a time.
        total += tl.load(tl.broadcast_to(bias + columns[None, :], total.shape), mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        places = out + rows.to(tl.int64)[:, None] * OUT_FEATURES + columns[None, :]
        total += tl.load(places, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def finish_tile(
    total,
    out,
    statistics,
    rows,
    columns,
    tile,
    is_live,
    num_rows,
    OUT_FEATURES: tl.constexpr,
    EVEN_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Stores total [rows, columns] float32, activated or with its statistics; returns which columns are not zero.

    `tile` is the place of the columns' statistics.
    """
    mask = is_live[:, None] if EVEN_N else is_live[:, None] & (columns < OUT_FEATURES)[None, :]
    places = out + rows.to(tl.int64)[:, None] * OUT_FEATURES + columns[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    if ACTIVATION == "relu_squared":
        total = relu_squared(total, dtype)
    stored = total.to(dtype)
    tl.store(places, stored, mask=mask)
    if RESIDUAL:
        store_statistics(statistics, stored.to(tl.float32), tile, rows, is_live, num_rows, OUT_FEATURES)
    return tl.max(((stored != 0.0) & mask).to(tl.int32), 0)


@triton.jit
def store_or_merge(
    total,
    out,
    bias,
    statistics,
    partials,
    counters,
    alive_out,
    column_tile,
    split,
    first_row,
    live_rows,
    num_rows,
    counter,
    OUT_FEATURES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr = TILE_ROWS,
    COLUMNS: tl.constexpr = STATISTICS_COLUMNS,
):
    """The end of a program: total [BLOCK_M, BLOCK_N] of one split to `out`, or to where the splits meet.

    They count their arrivals in counters[counter]; the program that arrives last adds all of them up.
    """
    EVEN_N: tl.constexpr = OUT_FEATURES % BLOCK_N == 0
    MERGE: tl.constexpr = (SPLITS > 1) or RESIDUAL
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    known = columns < OUT_FEATURES
    is_live = rows < live_rows

    if not MERGE:
        mask = is_live[:, None] & known[None, :]
        total = add_terms(total, out, bias, rows, columns, mask, OUT_FEATURES, RESIDUAL)
        alive = finish_tile(
            total, out, statistics, rows, columns, 0, is_live, num_rows, OUT_FEATURES, EVEN_N, ACTIVATION, RESIDUAL
        )
        if alive_out is not None:
            tl.store(alive_out + columns, alive.to(tl.int8), mask=known)
    else:
        partial = partials + (split * num_rows + rows).to(tl.int64)[:, None] * OUT_FEATURES + columns[None, :]
        tl.store(partial, total, mask=is_live[:, None] & known[None, :])
        # All of this program's stores, then its arrival; all others' arrivals, then the last one's loads.
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + counter, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLITS - 1:
            GROUP: tl.constexpr = min(BLOCK_M // ROWS, _MERGED_BLOCKS)
            for part in tl.static_range(BLOCK_N // COLUMNS):
                tile = column_tile * (BLOCK_N // COLUMNS) + part
                if tile * COLUMNS < OUT_FEATURES:
                    tile_columns = tile * COLUMNS + tl.arange(0, COLUMNS)
                    inside = (tile_columns < OUT_FEATURES)[None, :]
                    alive = tl.zeros((COLUMNS,), tl.int32)
                    for group in range(0, BLOCK_M, GROUP * ROWS):
                        if first_row + group < live_rows:
                            # The loads of all row blocks are issued before the first is finished: one wait, not GROUP.
                            totals = ()
                            for block in tl.static_range(GROUP):
                                tile_rows = first_row + group + block * ROWS + tl.arange(0, ROWS)
                                mask = (tile_rows < live_rows)[:, None] & inside
                                merged = sum_splits(
                                    partials, tile_rows, tile_columns, mask, num_rows, OUT_FEATURES, SPLITS
                                )
                                merged = add_terms(
                                    merged, out, bias, tile_rows, tile_columns, mask, OUT_FEATURES, RESIDUAL
                                )
                                totals += (merged,)  # type: ignore[assignment]
                            for block in tl.static_range(GROUP):
                                if first_row + group + block * ROWS < live_rows:
                                    tile_rows = first_row + group + block * ROWS + tl.arange(0, ROWS)
                                    tile_alive = finish_tile(
                                        totals[block], out, statistics, tile_rows, tile_columns, tile,
                                        tile_rows < live_rows, num_rows, OUT_FEATURES, EVEN_N, ACTIVATION, RESIDUAL,
                                    )  # fmt: skip
                                    alive = tl.maximum(alive, tile_alive)
                    if alive_out is not None:
                        tl.store(alive_out + tile_columns, alive.to(tl.int8), mask=tile_columns < OUT_FEATURES)
            tl.store(counters + counter, 0)


def normed_before(
    x: torch.Tensor, norm: Norm | None, *, in_prologue: bool, pdl: bool
) -> tuple[torch.Tensor, Norm | None]:
    """What a projection's kernel takes as rows, and the norm that it applies to them itself.

    Args:
        x: [M, in].
        norm: LayerNorm of x, or None.
        in_prologue: whether the kernel applies it to up to 16 rows; otherwise a kernel of its own does.
        pdl: whether that one's launch may overlap the end of the kernel before it.

    Returns:
        [M, in], x or its norm, and the norm that is left.

    Raises:
        ValueError: the statistics are not those of such rows.
    """
    rows, in_features = x.shape
    if norm is None:
        return x, None
    if rows > TILE_ROWS or not in_prologue:
        return layer_norm(x, norm.statistics, norm.weight, norm.bias, norm.eps, pdl=pdl), None
    if norm.statistics.shape != statistics_shape(rows, in_features):
        raise ValueError(
            f"statistics of x [{rows}, {in_features}] have the shape {statistics_shape(rows, in_features)}, "
            f"not {tuple(norm.statistics.shape)}"
        )
    return x, norm


def check_residual(x: torch.Tensor, rows: int, out_features: int, dtype: torch.dtype) -> None:
    """Makes sure that a product [rows, out_features] of this dtype can be added to x in place.

    Raises:
        ValueError: x has another shape or dtype, or is not contiguous.
    """
    if x.shape != (rows, out_features) or x.dtype != dtype or not x.is_contiguous():
        raise ValueError(
            f"x must be a contiguous [{rows}, {out_features}] {dtype} tensor, "
            f"not {tuple(x.shape)} {x.dtype} strided {x.stride()}"
        )
