"""Products of any number of rows with the bits of `projection`, for steps that are larger than a decode's.

Rows are tokens; knows nothing of sequences, layers or caches.

An output is summed exactly as `projection.projection_kernel` sums it: weight tile @ rows^T, in ascending order of the
input features within each split, then the splits in ascending order.  There the splits are programs that meet in
memory; here one program computes them one after the other, so nothing has to meet.  A row's bits therefore do not
depend on which of the two computed it, on the other rows, or on their number.  The residual's LayerNorm statistics are
a launch of their own, on the same tiles of 16 rows and 64 columns.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq, is_cuda

from persimmon.kernels.launch import Limits
from persimmon.kernels.layer_norm import (
    STATISTICS_COLUMNS,
    TILE_ROWS,
    exact_launch_options,
    statistics_shape,
    store_statistics,
)
from persimmon.kernels.projection_config import ProjectionConfig
from persimmon.kernels.projection_ends import add_terms, check_residual, finish_tile

LIMITS = {
    "rows_projection_kernel": Limits(registers=255, shared_bytes=100_000),
    "row_statistics_kernel": Limits(registers=40, shared_bytes=128),
}
"""What the kernels' machine code may take."""


@dataclass(frozen=True, slots=True)
class RowTiles:
    """How a product is cut up; changes no bit, since an output's order of summation is the `ProjectionConfig`'s.

    Attributes:
        rows: of a program.
        columns: output features of a program.
        features: input features of an iteration, a multiple of 16 that divides `SPLIT_ALIGNMENT`.
        warps: of a program.
        stages: iterations in flight, the one in use included.
    """

    rows: int
    columns: int
    features: int
    warps: int
    stages: int


TILES = RowTiles(rows=128, columns=128, features=64, warps=8, stages=3)
"""For 16-bit numbers; chosen from machine code, not yet run on a GPU."""

FLOAT32_TILES = RowTiles(rows=32, columns=64, features=32, warps=4, stages=3)
"""For float32, which the tensor cores do not multiply."""


@triton.jit
def split_total(
    x,
    weight,
    rows,
    columns,
    is_live,
    first,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_FEATURES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The products of the features of one split, in ascending order: [BLOCK_N, BLOCK_M], or turned if ROWS_FIRST."""
    accumulator = tl.zeros((BLOCK_M, BLOCK_N) if ROWS_FIRST else (BLOCK_N, BLOCK_M), tl.float32)
    known = columns < OUT_FEATURES
    row_places = x + rows.to(tl.int64)[:, None] * IN_FEATURES
    for start in tl.range(0, SPLIT_FEATURES, BLOCK_K, num_stages=STAGES):
        features = first + start + tl.arange(0, BLOCK_K)
        inside = features < IN_FEATURES
        x_mask = is_live[:, None] if EVEN_K else is_live[:, None] & inside[None, :]
        x_tile = tl.load(row_places + features[None, :], mask=x_mask, other=0.0)
        if TRANSPOSED:
            places = weight + features.to(tl.int64)[:, None] * OUT_FEATURES + columns[None, :]
            w_mask = inside[:, None] & known[None, :]
        else:
            places = weight + columns.to(tl.int64)[:, None] * IN_FEATURES + features[None, :]
            w_mask = known[:, None] & inside[None, :]
        w_tile = tl.load(places) if EVEN_N and EVEN_K else tl.load(places, mask=w_mask, other=0.0)
        if ROWS_FIRST:
            accumulator = tl.dot(x_tile, w_tile, accumulator, input_precision="ieee")
        else:
            accumulator = tl.dot(
                tl.trans(w_tile) if TRANSPOSED else w_tile, tl.trans(x_tile), accumulator, input_precision="ieee"
            )
    return accumulator


@triton.jit(do_not_specialize=["num_rows"])
def rows_projection_kernel(
    out,
    x,
    weight,
    bias,
    num_rows,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_FEATURES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N output features of BLOCK_M rows; see `project_rows`, `project_rows_add_`."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    EVEN_N: tl.constexpr = OUT_FEATURES % BLOCK_N == 0
    EVEN_K: tl.constexpr = IN_FEATURES == SPLITS * SPLIT_FEATURES
    # The operands' sides are those of `projection_kernel`.
    ROWS_FIRST: tl.constexpr = TRANSPOSED and is_cuda() and not cuda_capability_geq(9, 0)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_live = rows < num_rows
    if SPLITS == 1:
        total = split_total(
            x, weight, rows, columns, is_live, 0, IN_FEATURES, OUT_FEATURES, TRANSPOSED, ROWS_FIRST, EVEN_N, EVEN_K,
            SPLIT_FEATURES, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
    else:
        # As `projection_ends.sum_splits` adds them.
        total = tl.zeros((BLOCK_M, BLOCK_N) if ROWS_FIRST else (BLOCK_N, BLOCK_M), tl.float32)
        for split in tl.range(0, SPLITS):
            total += split_total(
                x, weight, rows, columns, is_live, split * SPLIT_FEATURES, IN_FEATURES, OUT_FEATURES, TRANSPOSED,
                ROWS_FIRST, EVEN_N, EVEN_K, SPLIT_FEATURES, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
            )  # fmt: skip
    total = total if ROWS_FIRST else tl.trans(total)
    mask = is_live[:, None] & (columns < OUT_FEATURES)[None, :]
    total = add_terms(total, out, bias, rows, columns, mask, OUT_FEATURES, RESIDUAL)
    # Without statistics, which take tiles of another shape.
    finish_tile(total, out, None, rows, columns, 0, is_live, num_rows, OUT_FEATURES, EVEN_N, ACTIVATION, False)


@triton.jit(do_not_specialize=["num_rows"])
def row_statistics_kernel(
    statistics,
    x,
    num_rows,
    HIDDEN: tl.constexpr,
    PDL: tl.constexpr,
    ROWS: tl.constexpr = TILE_ROWS,
    COLUMNS: tl.constexpr = STATISTICS_COLUMNS,
):
    """One tile of COLUMNS columns of ROWS rows; see `row_statistics`."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    is_live = rows < num_rows
    inside = is_live[:, None]
    if HIDDEN % COLUMNS != 0:
        inside = inside & (columns < HIDDEN)[None, :]
    values = tl.load(x + rows.to(tl.int64)[:, None] * HIDDEN + columns[None, :], mask=inside, other=0.0)
    store_statistics(statistics, values.to(tl.float32), tile, rows, is_live, num_rows, HIDDEN)


def project_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    transposed: bool = False,
    activation: Literal["none", "relu_squared"] = "none",
    config: ProjectionConfig,
    out: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """activation(x @ weight.T + bias), summed in float32 and rounded once; the bits of `projection.project`.

    Reads 2 * in * out bytes of weights in 16 bits for each `TILES.rows` rows, from the L2 cache where their programs
    run together, and the rows for each `TILES.columns` output features; writes M * out numbers.

    Args:
        x: [M, in], any M.
        weight: [out, in], or [in, out] if transposed.
        bias: [out] or None.
        transposed: how the weight is stored.
        activation: "relu_squared" for max(., 0)^2, which saturates at 65,504 in float16.
        config: which features are summed apart: that of the same product in `projection`.
        out: [M, out] contiguous, to write to; a new tensor where None.
        dtype: of a new tensor; x's where None.
        pdl: whether the launch may overlap the end of the kernel before it.

    Returns:
        out.
    """
    rows, out_features = _check(x, weight, bias, transposed)
    if out is None:
        out = torch.empty(rows, out_features, dtype=dtype or x.dtype, device=x.device)
    elif out.shape != (rows, out_features) or not out.is_contiguous():
        raise ValueError(f"out must be a contiguous [{rows}, {out_features}], not {tuple(out.shape)} {out.stride()}")
    _launch(out, x, weight, bias, transposed, activation, False, config, pdl)
    return out


def project_rows_add_(
    x: torch.Tensor,
    activation: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    transposed: bool = False,
    config: ProjectionConfig,
    pdl: bool = False,
) -> torch.Tensor:
    """X += activation @ weight.T + bias in place, and the statistics of the new x; as `projection.project_add_`.

    Reads and writes what `project_rows` does, and M * out numbers of x twice more.

    Args:
        x: [M, out], the residual stream.
        activation: [M, in].
        weight, bias, transposed, config, pdl: as in `project_rows`.

    Returns:
        [2, tiles, M] float32, see `row_statistics`.
    """
    rows, out_features = _check(activation, weight, bias, transposed)
    check_residual(x, rows, out_features, activation.dtype)
    _launch(x, activation, weight, bias, transposed, "none", True, config, pdl)
    return row_statistics(x, pdl=pdl)


def row_statistics(x: torch.Tensor, *, pdl: bool = False) -> torch.Tensor:
    """Mean and sum of squared deviations of each tile of 64 columns, with the bits that `layer_norm.embed` gives.

    Reads M * hidden numbers, writes 8 * M * hidden / 64 bytes.

    Args:
        x: [M, hidden] contiguous.
        pdl: whether the launch may overlap the end of the kernel before it.

    Returns:
        [2, tiles, M] float32.
    """
    rows, hidden = x.shape
    statistics = torch.empty(statistics_shape(rows, hidden), dtype=torch.float32, device=x.device)
    if rows:
        row_statistics_kernel[(statistics.shape[1], triton.cdiv(rows, TILE_ROWS))](
            statistics, x, rows, HIDDEN=hidden, PDL=pdl, num_warps=4, **exact_launch_options(pdl)
        )
    return statistics


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> tuple[int, int]:
    """Rows and output features, after making sure that the tensors fit together."""
    rows, in_features = x.shape
    in_dim = 0 if transposed else 1
    if weight.ndim != 2 or weight.shape[in_dim] != in_features or weight.dtype != x.dtype:
        raise ValueError(
            f"weight {tuple(weight.shape)} {weight.dtype} does not take x [{rows}, {in_features}] {x.dtype}"
        )
    out_features = weight.shape[1 - in_dim]
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias must have the shape [{out_features}], not {tuple(bias.shape)}")
    if not (x.is_contiguous() and weight.is_contiguous()):
        raise ValueError(f"x and weight must be contiguous, not strided {x.stride()} and {weight.stride()}")
    return rows, out_features


def _launch(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
    activation: Literal["none", "relu_squared"],
    residual: bool,
    config: ProjectionConfig,
    pdl: bool,
) -> None:
    (rows, in_features), out_features = x.shape, out.shape[1]
    if rows == 0:
        return
    tiles = TILES if x.element_size() == 2 else FLOAT32_TILES
    # Rows first: the programs that run together share few columns of the weight, and all rows.
    rows_projection_kernel[(triton.cdiv(rows, tiles.rows), triton.cdiv(out_features, tiles.columns))](
        out,
        x,
        weight,
        bias,
        rows,
        IN_FEATURES=in_features,
        OUT_FEATURES=out_features,
        TRANSPOSED=transposed,
        ACTIVATION=activation,
        RESIDUAL=residual,
        SPLITS=config.splits,
        SPLIT_FEATURES=config.split_features(in_features),
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.columns,
        BLOCK_K=tiles.features,
        STAGES=tiles.stages,
        PDL=pdl,
        num_warps=tiles.warps,
        **exact_launch_options(pdl),
    )
