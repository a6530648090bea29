"""The projections of decode steps: a weight is streamed once for up to 256 rows.

Rows are tokens; knows nothing of sequences, layers or caches.  Prompts use cuBLAS instead.

One kernel computes weight tile @ rows^T, so that the matrix units see 64 or more of the weight's columns and as few as
16 rows.  Every output is summed in ascending order of the input features within a fixed number of splits, and the
splits are summed in ascending order by whichever program arrives last: a row's bits depend on neither the other rows
nor their number.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq, is_cuda

from persimmon.kernels.launch import Limits, max_shared_bytes, next_power_of_2
from persimmon.kernels.layer_norm import (
    exact_launch_options,
    merge_statistics,
    normalise,
    statistics_shape,
)
from persimmon.kernels.prefetch import LINE_BYTES, prefetch
from persimmon.kernels.projection_config import ATTENTION_OUT, MLP_DOWN, WIDE, Norm, ProjectionConfig, Workspace
from persimmon.kernels.projection_ends import check_residual, normed_before, store_or_merge

__all__ = ["ATTENTION_OUT", "MLP_DOWN", "WIDE", "Norm", "ProjectionConfig", "Workspace", "project", "project_add_"]

MAX_ROWS = 256
"""Rows that one launch takes; with more, reading the weight once no longer limits a projection."""

LIMITS = {
    "projection_kernel, 16 rows": Limits(registers=128, shared_bytes=118_000),
    "projection_kernel, 32 rows": Limits(registers=188, shared_bytes=166_000),
    "projection_kernel, 64 rows": Limits(registers=188, shared_bytes=150_000),
    # All but sm_90 need nearly every register there is; what counts is that none is spilled.
    "projection_kernel, 256 rows": Limits(registers=255, shared_bytes=118_000),
    "projection_kernel, 256 rows, sm_90": Limits(registers=220, shared_bytes=118_000),
    "projection_kernel, float32": Limits(registers=228, shared_bytes=118_000),
}
"""What the kernel's machine code may take."""


_AHEAD_FEATURES = tl.constexpr(512)
"""Input features of a program's weights that a dependent launch asks for while the launch before it ends."""


@triton.jit
def prefetch_weight(
    weight,
    first,
    column,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LINE_BYTES: tl.constexpr = LINE_BYTES,
):
    """Brings the weights from `first` input features on and BLOCK_N output features from `column` on into the cache."""
    LINE: tl.constexpr = 8 * LINE_BYTES // weight.dtype.element_ty.primitive_bitwidth
    if TRANSPOSED:
        features = first + tl.arange(0, _AHEAD_FEATURES)[:, None]
        columns = column + tl.arange(0, BLOCK_N // LINE)[None, :] * LINE
    else:
        features = first + tl.arange(0, _AHEAD_FEATURES // LINE)[None, :] * LINE
        columns = column + tl.arange(0, BLOCK_N)[:, None]
    features = tl.minimum(features, IN_FEATURES - 1).to(tl.int64)
    columns = tl.minimum(columns, OUT_FEATURES - 1).to(tl.int64)
    prefetch(weight + (features * OUT_FEATURES + columns if TRANSPOSED else columns * IN_FEATURES + features))


@triton.jit
def alive_iterations(alive, first, IN_FEATURES: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_K, 1] int32: bit t is the flag of input feature first + t * BLOCK_K + k.

    The loop over features then needs no load, and no exchange between threads, to know which rows of a tile to read.
    """
    turns = tl.arange(0, 32)[:, None]
    features = first + turns * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    flags = tl.load(alive + features, mask=features < IN_FEATURES, other=0)
    return tl.sum((flags != 0).to(tl.int32) << turns, 0)[:, None]


@triton.jit(do_not_specialize=["num_rows"])
def projection_kernel(
    out,
    x,
    weight,
    bias,
    live,
    norm_statistics,
    norm_weight,
    norm_bias,
    alive_in,
    alive_out,
    statistics,
    partials,
    counters,
    num_rows,
    eps,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_FEATURES: tl.constexpr,
    NORM_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N output features over one split of the input features, for all rows; see `project`, `project_add_`."""
    if PDL:
        if alive_in is None:
            # Weights depend on no launch.  With flags, it is the launch before that decides which of them are read.
            first, column = tl.program_id(1) * SPLIT_FEATURES, tl.program_id(0) * BLOCK_N
            prefetch_weight(weight, first, column, IN_FEATURES, OUT_FEATURES, TRANSPOSED, BLOCK_N)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    EVEN_N: tl.constexpr = OUT_FEATURES % BLOCK_N == 0
    EVEN_K: tl.constexpr = IN_FEATURES == SPLITS * SPLIT_FEATURES
    # Before sm_90 a transposed weight tile reaches the matrix units through shared memory only as right operand.
    ROWS_FIRST: tl.constexpr = TRANSPOSED and is_cuda() and not cuda_capability_geq(9, 0)
    column_tile = tl.program_id(0)
    split = tl.program_id(1) if SPLITS > 1 else 0
    # Needed only at the end: rows behind the live ones are read, and stay in their own column of the product.
    live_rows = tl.minimum(tl.load(live), num_rows)
    rows = tl.arange(0, BLOCK_M)
    exists = rows < num_rows
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    known = columns < OUT_FEATURES
    if norm_statistics is not None:
        mean, scale = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)

    accumulator = tl.zeros((BLOCK_M, BLOCK_N) if ROWS_FIRST else (BLOCK_N, BLOCK_M), tl.float32)
    first = split * SPLIT_FEATURES
    # With flags, a part is as many iterations as a word has bits.
    TURNS: tl.constexpr = 32 if alive_in is not None else SPLIT_FEATURES // BLOCK_K
    for part in tl.static_range(0, SPLIT_FEATURES, TURNS * BLOCK_K):
        if alive_in is not None:
            alive_turns = alive_iterations(alive_in, first + part, IN_FEATURES, BLOCK_K)
        for start in tl.range(part, min(part + TURNS * BLOCK_K, SPLIT_FEATURES), BLOCK_K, num_stages=STAGES):
            features = first + start + tl.arange(0, BLOCK_K)
            if TRANSPOSED:
                read = (features < IN_FEATURES)[:, None]
                if alive_in is not None:
                    read = (alive_turns >> ((start - part) // BLOCK_K)) & 1 != 0
                corner = weight + (first + start).to(tl.int64) * OUT_FEATURES + column_tile * BLOCK_N
                places = corner + tl.arange(0, BLOCK_K)[:, None] * OUT_FEATURES + tl.arange(0, BLOCK_N)[None, :]
                if alive_in is not None or not EVEN_K:
                    w_mask = read if EVEN_N else read & known[None, :]
                    w_tile = tl.load(places, mask=w_mask, other=0.0)
                elif EVEN_N:
                    w_tile = tl.load(places)
                else:
                    w_tile = tl.load(places, mask=known[None, :], other=0.0)
            else:
                corner = weight + column_tile.to(tl.int64) * (BLOCK_N * IN_FEATURES)
                places = corner + (tl.arange(0, BLOCK_N)[:, None] * IN_FEATURES + features[None, :])
                if EVEN_N and EVEN_K:
                    w_tile = tl.load(places)
                else:
                    w_tile = tl.load(places, mask=known[:, None] & (features < IN_FEATURES)[None, :], other=0.0)
            x_mask = exists[:, None] if EVEN_K else exists[:, None] & (features < IN_FEATURES)[None, :]
            # One offset a number, as for the weight: less arithmetic before the first copy than two steps of a pointer.
            x_tile = tl.load(x + (rows[:, None] * IN_FEATURES + features[None, :]), mask=x_mask, other=0.0)
            if norm_statistics is not None:
                if EVEN_K:
                    gamma, beta = tl.load(norm_weight + features), tl.load(norm_bias + features)
                else:
                    gamma = tl.load(norm_weight + features, mask=features < IN_FEATURES, other=0.0)
                    beta = tl.load(norm_bias + features, mask=features < IN_FEATURES, other=0.0)
                if start == 0:
                    # Not before the loop: the weights of its first iterations are on their way by now.
                    mean, scale = merge_statistics(
                        norm_statistics, rows, exists, num_rows, eps, IN_FEATURES, NORM_TILES
                    )
                normed = normalise(x_tile, mean[:, None], scale[:, None], gamma[None, :], beta[None, :])
                x_tile = normed.to(x.dtype.element_ty)
            if ROWS_FIRST:
                accumulator = tl.dot(x_tile, w_tile, accumulator, input_precision="ieee")
            else:
                accumulator = tl.dot(
                    tl.trans(w_tile) if TRANSPOSED else w_tile, tl.trans(x_tile), accumulator, input_precision="ieee"
                )
    total = accumulator if ROWS_FIRST else tl.trans(accumulator)
    store_or_merge(
        total, out, bias, statistics, partials, counters, alive_out, column_tile, split, 0, live_rows, num_rows,
        column_tile, OUT_FEATURES, ACTIVATION, RESIDUAL, SPLITS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


def project(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    norm: Norm | None = None,
    activation: Literal["none", "relu_squared"] = "none",
    live: torch.Tensor,
    workspace: Workspace,
    config: ProjectionConfig = WIDE,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """activation(norm(x) @ weight.T + bias), summed in float32 and rounded once.

    Reads the weight once, 2 * in * out bytes in 16 bits, and M * in numbers of x (a program reads them from the L2
    cache); writes M * out numbers.  More than one split writes and reads 4 * splits * live * out bytes, which stay in
    the L2 cache.

    Args:
        x: [M, in], M <= 256.
        weight: [out, in].
        bias: [out] or None.
        norm: LayerNorm of x first, rounded to x's dtype.
        activation: "relu_squared" for max(., 0)^2, which saturates at 65,504 in float16.
        live: [1] int32, how many rows there are; those behind do not count and are not written.
        workspace: used where config has splits.
        config: how to cut it up.
        pdl: whether the launch may overlap the end of the kernel before it.

    Returns:
        out [M, out] in x's dtype, and for relu_squared the flags [out] int8: one where any live row's activation is
        not zero.
    """
    rows, _ = _check(x, weight, bias, in_dim=1)
    x, norm = normed_before(x, norm, in_prologue=config.norm_in_prologue, pdl=pdl)
    out = torch.empty(rows, weight.shape[0], dtype=x.dtype, device=x.device)
    alive = None
    if activation == "relu_squared":
        alive = torch.empty(weight.shape[0], dtype=torch.int8, device=x.device)
    _launch(out, x, weight, bias, live, norm, activation, False, None, alive, None, workspace, config, pdl)
    return out, alive


def project_add_(
    x: torch.Tensor,
    activation: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    transposed: bool = False,
    alive: torch.Tensor | None = None,
    live: torch.Tensor,
    workspace: Workspace,
    config: ProjectionConfig,
    pdl: bool = False,
) -> torch.Tensor:
    """X += activation @ weight.T + bias in place, and the statistics of the new x.

    Reads the weight once, 2 * in * out bytes in 16 bits (2 * alive * out with flags), and M * in numbers of the
    activation (a program reads them from the L2 cache); reads and writes M * out numbers of x; writes and reads
    4 * splits * live * out bytes of partial sums, which stay in the L2 cache, and writes 8 * M * out / 64 of
    statistics.

    Args:
        x: [M, out], M <= 256, the residual stream.
        activation: [M, in].
        weight: [out, in], or [in, out] if transposed.
        bias: [out] or None.
        transposed: how the weight is stored.
        alive: [in] int8; rows of a transposed weight whose flag is 0 are not read.  Where a flag is 0 only if the
            activation is 0 in every live row, the result is that of the full product, bit for bit: the same zeros
            are added in the same places.
        live: [1] int32, how many rows there are; those behind do not count and are not written.
        workspace: where the splits meet.
        config: how to cut it up.
        pdl: whether the launch may overlap the end of the kernel before it.

    Returns:
        [2, tiles, M] float32, mean and sum of squared deviations of each tile of 64 columns of what x now holds.
    """
    rows, in_features = _check(activation, weight, bias, in_dim=0 if transposed else 1)
    out_features = weight.shape[1 if transposed else 0]
    check_residual(x, rows, out_features, activation.dtype)
    if alive is not None and (not transposed or alive.shape != (in_features,)):
        raise ValueError(f"flags [{in_features}] belong to a transposed weight, not {tuple(alive.shape)}")
    statistics = torch.empty(statistics_shape(rows, out_features), dtype=torch.float32, device=x.device)
    _launch(
        x, activation, weight, bias, live, None, "none", transposed, alive, None, statistics, workspace, config, pdl
    )
    return statistics


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, in_dim: int) -> tuple[int, int]:
    """Rows and input features, after making sure that the tensors fit together."""
    rows, in_features = x.shape
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"a projection takes 1 to {MAX_ROWS} rows, not {rows}")
    if weight.ndim != 2 or weight.shape[in_dim] != in_features or weight.dtype != x.dtype:
        raise ValueError(
            f"weight {tuple(weight.shape)} {weight.dtype} does not take x [{rows}, {in_features}] {x.dtype}"
        )
    if bias is not None and bias.shape != (weight.shape[1 - in_dim],):
        raise ValueError(f"bias must have the shape [{weight.shape[1 - in_dim]}], not {tuple(bias.shape)}")
    if not (x.is_contiguous() and weight.is_contiguous()):
        raise ValueError(f"x and weight must be contiguous, not strided {x.stride()} and {weight.stride()}")
    return rows, in_features


def _launch(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    live: torch.Tensor,
    norm: Norm | None,
    activation: Literal["none", "relu_squared"],
    transposed: bool,
    alive_in: torch.Tensor | None,
    alive_out: torch.Tensor | None,
    statistics: torch.Tensor | None,
    workspace: Workspace,
    config: ProjectionConfig,
    pdl: bool,
) -> None:
    (rows, in_features), out_features = x.shape, out.shape[1]
    residual = statistics is not None
    block_m = max(16, next_power_of_2(rows))
    tiling = config.tiling(block_m, x.element_size(), max_shared_bytes(x.device))
    tiles = triton.cdiv(out_features, tiling.block_n)
    splits = config.splits
    if splits > 1 or residual:
        workspace.check(splits, rows, out_features, tiles)
    projection_kernel[(tiles, splits)](
        out,
        x,
        weight,
        bias,
        live,
        norm.statistics if norm else None,
        norm.weight if norm else None,
        norm.bias if norm else None,
        alive_in,
        alive_out,
        statistics,
        workspace.partials,
        workspace.counters,
        rows,
        norm.eps if norm else 0.0,
        IN_FEATURES=in_features,
        OUT_FEATURES=out_features,
        TRANSPOSED=transposed,
        ACTIVATION=activation,
        RESIDUAL=residual,
        SPLITS=splits,
        SPLIT_FEATURES=config.split_features(in_features),
        NORM_TILES=next_power_of_2(norm.statistics.shape[1]) if norm else 1,
        BLOCK_M=block_m,
        BLOCK_N=tiling.block_n,
        BLOCK_K=tiling.block_k,
        STAGES=tiling.stages,
        PDL=pdl,
        num_warps=config.warps,
        **exact_launch_options(pdl),
    )
