"""The residual stream outside the projections: embedding, LayerNorm, and the prompts' squared ReLU.

Rows are tokens; knows nothing of sequences, layers or caches.

The kernel that writes the residual stream also writes, for each row and each tile of `STATISTICS_COLUMNS` columns, the
mean and the sum of squared deviations of what it stored, so that a LayerNorm of a decode step reads a few numbers a row
instead of the row (Chan, Golub, LeVeque: Updating Formulae and a Pairwise Algorithm for Computing Sample Variances,
1979).  These tiles are always worked on `TILE_ROWS` rows at a time: a row's sums then have one order, however many rows
run with it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from persimmon.kernels.launch import Limits, launch_options, next_power_of_2
from persimmon.kernels.quantized import QuantizedMatrix

STATISTICS_COLUMNS = 64
"""Columns that share a mean and a sum of squared deviations."""

TILE_ROWS = 16
"""Rows whose statistics are computed and merged together."""


LIMITS = {
    "embed_kernel": Limits(registers=40, shared_bytes=128),
    # A tile changes its layout between the load of bytes and the store of four times as many.
    "embed_kernel, 8-bit table in float32": Limits(registers=40, shared_bytes=4096),
    "merged_layer_norm_kernel": Limits(registers=96, shared_bytes=1280),
    "row_layer_norm_kernel": Limits(registers=56, shared_bytes=64),
    "bias_relu_squared_kernel": Limits(registers=64, shared_bytes=0),
}
"""What the kernels' machine code may take."""


@dataclass(frozen=True, slots=True)
class ElementwiseConfig:
    """How the kernels of this file are launched.

    Attributes:
        norm_columns: columns of a row that one program of the LayerNorm from statistics writes.
        row_warps: warps that share a row in the LayerNorm of prompts.
        activation_columns: numbers that one program of the squared ReLU turns.
    """

    norm_columns: int = 256
    row_warps: int = 8
    activation_columns: int = 4096


DEFAULT_CONFIG = ElementwiseConfig()


def statistics_shape(rows: int, hidden: int) -> tuple[int, int, int]:
    """[2, tiles, rows]: mean and sum of squared deviations of each tile of each row."""
    return 2, triton.cdiv(hidden, STATISTICS_COLUMNS), rows


@triton.jit
def store_statistics(
    statistics, values, tile, rows, is_live, num_rows, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr = STATISTICS_COLUMNS
):
    """Writes mean and squared deviations of one tile: values [TILE_ROWS, STATISTICS_COLUMNS] float32."""
    TILES: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    columns = tl.arange(0, COLUMNS)
    if HIDDEN % COLUMNS == 0:
        mean = tl.sum(values, 1) * (1.0 / COLUMNS)
        deviations = values - mean[:, None]
    else:
        count = tl.minimum(HIDDEN - tile * COLUMNS, COLUMNS)
        inside = columns[None, :] < count
        mean = tl.sum(tl.where(inside, values, 0.0), 1) / count.to(tl.float32)
        deviations = tl.where(inside, values - mean[:, None], 0.0)
    squares = tl.sum(deviations * deviations, 1)
    places = statistics + tile * num_rows + rows
    tl.store(places, mean, mask=is_live)
    tl.store(places + TILES * num_rows, squares, mask=is_live)


@triton.jit
def merge_statistics(
    statistics,
    rows,
    is_live,
    num_rows,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    COLUMNS: tl.constexpr = STATISTICS_COLUMNS,
):
    """Mean and 1 / sqrt(variance + eps) of TILE_ROWS rows from their tiles' statistics."""
    TILES: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    tiles = tl.arange(0, BLOCK_TILES)
    places = statistics + tiles[:, None] * num_rows + rows[None, :]
    mask = (tiles < TILES)[:, None] & is_live[None, :]
    means = tl.load(places, mask=mask, other=0.0)
    squares = tl.load(places + TILES * num_rows, mask=mask, other=0.0)
    counts = tl.minimum(tl.maximum(HIDDEN - tiles * COLUMNS, 0), COLUMNS)
    counts = counts.to(tl.float32)[:, None]
    mean = tl.sum(means * counts, 0) * (1.0 / HIDDEN)
    deviations = means - mean[None, :]
    variance = tl.sum(tl.fma(deviations * counts, deviations, squares), 0) * (1.0 / HIDDEN)
    return mean, tl.rsqrt(variance + eps)


@triton.jit
def normalise(x, mean, scale, weight, bias):
    """(x - mean) * scale * weight + bias in float32, the same operations wherever it is used."""
    return tl.fma((x.to(tl.float32) - mean) * scale, weight.to(tl.float32), bias.to(tl.float32))


@triton.jit(do_not_specialize=["num_rows", "num_sampled"])
def embed_kernel(
    x,
    statistics,
    token_ids,
    sampled,
    table,
    scales,
    live,
    num_rows,
    num_sampled,
    VOCABULARY: tl.constexpr,
    HIDDEN: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
    ROWS: tl.constexpr = TILE_ROWS,
    COLUMNS: tl.constexpr = STATISTICS_COLUMNS,
):
    """One tile of STATISTICS_COLUMNS columns of TILE_ROWS rows; see `embed`."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_live = rows < (num_rows if live is None else tl.minimum(tl.load(live), num_rows))
    ids = tl.load(token_ids + rows, mask=is_live, other=0)
    if sampled is not None:
        places = -1 - ids
        ids = tl.where(ids < 0, tl.load(sampled + places, mask=(places >= 0) & (places < num_sampled), other=-1), ids)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = is_live[:, None]
    if HIDDEN % COLUMNS != 0:
        inside = inside & (columns < HIDDEN)[None, :]
    known = ((ids >= 0) & (ids < VOCABULARY))[:, None]
    values = tl.load(table + ids[:, None] * HIDDEN + columns[None, :], mask=inside & known, other=0)
    if scales is not None:
        places = scales + ids[:, None] * (HIDDEN // GROUP) + columns[None, :] // GROUP
        scale = tl.load(places, mask=inside & known, other=0.0).to(tl.float32)
        values = (values.to(tl.float32) * scale).to(x.dtype.element_ty)
    tl.store(x + rows.to(tl.int64)[:, None] * HIDDEN + columns[None, :], values, mask=inside)
    store_statistics(statistics, values.to(tl.float32), tile, rows, is_live, num_rows, HIDDEN)


@triton.jit(do_not_specialize=["num_rows"])
def merged_layer_norm_kernel(
    normed,
    x,
    statistics,
    weight,
    bias,
    num_rows,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
    ROWS: tl.constexpr = TILE_ROWS,
):
    """BLOCK_COLUMNS columns of TILE_ROWS rows whose statistics are known; see `layer_norm`."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    mean, scale = merge_statistics(statistics, rows, inside, num_rows, eps, HIDDEN, BLOCK_TILES)
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    known = columns < HIDDEN
    places = rows.to(tl.int64)[:, None] * HIDDEN + columns[None, :]
    mask = inside[:, None] & known[None, :]
    values = tl.load(x + places, mask=mask, other=0.0)
    gamma = tl.load(weight + columns, mask=known, other=0.0)
    beta = tl.load(bias + columns, mask=known, other=0.0)
    out = normalise(values, mean[:, None], scale[:, None], gamma[None, :], beta[None, :])
    tl.store(normed + places, out.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def row_layer_norm_kernel(
    normed,
    x,
    residual,
    weight,
    bias,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row, held in registers between the passes; see `layer_norm`."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    columns = tl.arange(0, BLOCK_COLUMNS)
    known = columns < HIDDEN
    row = tl.program_id(0).to(tl.int64) * HIDDEN
    values = tl.load(x + row + columns, mask=known, other=0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + row + columns, mask=known, other=0.0).to(tl.float32)
        stored = values.to(x.dtype.element_ty)
        tl.store(x + row + columns, stored, mask=known)
        values = stored.to(tl.float32)
    mean = tl.sum(values, 0) * (1.0 / HIDDEN)
    deviations = tl.where(known, values - mean, 0.0)
    scale = tl.rsqrt(tl.sum(deviations * deviations, 0) * (1.0 / HIDDEN) + eps)
    gamma = tl.load(weight + columns, mask=known, other=0.0)
    beta = tl.load(bias + columns, mask=known, other=0.0)
    out = normalise(values, mean, scale, gamma, beta)
    tl.store(normed + row + columns, out.to(normed.dtype.element_ty), mask=known)


@triton.jit
def relu_squared(x, dtype: tl.constexpr):
    """max(x, 0)^2 in float32, ending at float16's largest number where that is the dtype; NaN stays NaN."""
    positive = tl.where(x < 0.0, 0.0, x)
    squared = positive * positive
    if dtype == tl.float16:
        squared = tl.where(squared > 65504.0, 65504.0, squared)
    return squared


@triton.jit
def bias_relu_squared_kernel(x, bias, WIDTH: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PDL: tl.constexpr):
    """BLOCK_COLUMNS numbers of one row; see `bias_relu_squared_`."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    known = columns < WIDTH
    places = x + tl.program_id(0).to(tl.int64) * WIDTH + columns
    values = tl.load(places, mask=known, other=0.0).to(tl.float32)
    if bias is not None:
        values += tl.load(bias + columns, mask=known, other=0.0).to(tl.float32)
    dtype: tl.constexpr = x.dtype.element_ty
    tl.store(places, relu_squared(values, dtype).to(dtype), mask=known)


def embed(
    token_ids: torch.Tensor,
    sampled: torch.Tensor | None,
    table: torch.Tensor | QuantizedMatrix,
    live: torch.Tensor | None = None,
    *,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The embedding's rows: where the residual stream begins.

    Reads and writes 2 * M * hidden numbers, and writes 8 * M * hidden / 64 bytes of statistics.

    Args:
        token_ids: [M] int64.  A negative id -1 - r stands for `sampled[r]`, so that a step can follow another whose
            samples the host has not seen.  Any other id outside the table gives zeros.
        sampled: int64, the samples that negative ids refer to; None where there are none.
        table: [vocabulary, hidden]; or of 8-bit numbers, which a row's or a group's scale multiplies in float32.
        live: [1] int32, how many rows are to be written; None for all.
        pdl: whether the launch may overlap the end of the kernel before it.

    Returns:
        x [M, hidden] in the dtype of the table, or of its scales, and its statistics [2, tiles, M] float32.  Rows
        behind `live` hold whatever the memory held.
    """
    rows, (vocabulary, hidden) = token_ids.shape[0], table.shape
    numbers: torch.Tensor
    scales: torch.Tensor | None
    if isinstance(table, QuantizedMatrix):
        if table.bits != 8:
            raise ValueError(f"the embedding has {table.bits} bits; the kernels of a GPU look up 8 or 16 of them")
        numbers, scales, group = table.numbers, table.scales, table.group_size
    else:
        numbers, scales, group = table, None, hidden
    _check_contiguous(token_ids=token_ids, sampled=sampled, table=numbers, scales=scales)
    dtype = numbers.dtype if scales is None else scales.dtype
    x = torch.empty(rows, hidden, dtype=dtype, device=numbers.device)
    statistics = torch.empty(statistics_shape(rows, hidden), dtype=torch.float32, device=numbers.device)
    if rows:
        embed_kernel[(statistics.shape[1], triton.cdiv(rows, TILE_ROWS))](
            x,
            statistics,
            token_ids,
            sampled,
            numbers,
            scales,
            live,
            rows,
            0 if sampled is None else sampled.numel(),
            VOCABULARY=vocabulary,
            HIDDEN=hidden,
            GROUP=group,
            PDL=pdl,
            num_warps=4,
            **exact_launch_options(pdl),
        )
    return x, statistics


def layer_norm(
    x: torch.Tensor,
    statistics: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    config: ElementwiseConfig = DEFAULT_CONFIG,
    pdl: bool = False,
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension.

    With statistics (decode steps) the rows' means and variances are merged from their tiles'; without, each row is
    read once and held while its mean, then its variance are computed (prompts).  Either reads and writes
    2 * M * hidden numbers; statistics add 8 * M * hidden / 64 bytes per `config.norm_columns` columns, a residual
    another 2 * M * hidden numbers.

    Args:
        x: [M, hidden].
        statistics: [2, tiles, M] float32, of x; None to compute them from the rows.
        weight, bias: [hidden].
        eps: added to the biased variance.
        residual: [M, hidden], added to x in place first; only without statistics.
        config: how to launch.
        pdl: whether the launch may overlap the end of the kernel before it.

    Returns:
        [M, hidden] in x's dtype.
    """
    _check_contiguous(x=x, statistics=statistics, weight=weight, bias=bias, residual=residual)
    rows, hidden = x.shape
    normed = torch.empty_like(x)
    if statistics is None:
        if rows:
            row_layer_norm_kernel[(rows,)](
                normed,
                x,
                residual,
                weight,
                bias,
                eps,
                HIDDEN=hidden,
                BLOCK_COLUMNS=next_power_of_2(hidden),
                PDL=pdl,
                num_warps=config.row_warps,
                **exact_launch_options(pdl),
            )
        return normed
    if residual is not None:
        raise ValueError("statistics describe x before the residual is added: give one of the two")
    if statistics.shape != statistics_shape(rows, hidden):
        raise ValueError(
            f"statistics of x [{rows}, {hidden}] have the shape {statistics_shape(rows, hidden)}, "
            f"not {tuple(statistics.shape)}"
        )
    if rows:
        block_columns = min(config.norm_columns, next_power_of_2(hidden))
        merged_layer_norm_kernel[(triton.cdiv(hidden, block_columns), triton.cdiv(rows, TILE_ROWS))](
            normed,
            x,
            statistics,
            weight,
            bias,
            rows,
            eps,
            HIDDEN=hidden,
            BLOCK_TILES=next_power_of_2(statistics.shape[1]),
            BLOCK_COLUMNS=block_columns,
            PDL=pdl,
            num_warps=4,
            **exact_launch_options(pdl),
        )
    return normed


def bias_relu_squared_(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    config: ElementwiseConfig = DEFAULT_CONFIG,
    pdl: bool = False,
) -> torch.Tensor:
    """max(x + bias, 0)^2 in place; float16 saturates at 65,504 instead of becoming infinite.

    Reads and writes 2 * M * width numbers: 64 KiB a token for the 8B model in 16 bits.

    Args:
        x: [M, width].
        bias: [width] or None.
        config: how to launch.
        pdl: whether the launch may overlap the end of the kernel before it.

    Returns:
        x.
    """
    _check_contiguous(x=x, bias=bias)
    rows, width = x.shape
    if rows:
        block_columns = min(config.activation_columns, next_power_of_2(width))
        bias_relu_squared_kernel[(rows, triton.cdiv(width, block_columns))](
            x, bias, WIDTH=width, BLOCK_COLUMNS=block_columns, PDL=pdl, num_warps=4, **exact_launch_options(pdl)
        )
    return x


def exact_launch_options(pdl: bool) -> dict[str, bool]:
    """Options of every launch here and of the projections.

    Products and sums are fused where the code says so and nowhere else: two kernels that do the same arithmetic
    then agree to the last bit.
    """
    return {"enable_fp_fusion": False, **launch_options(pdl)}


def _check_contiguous(**tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not strided {tensor.stride()}")
