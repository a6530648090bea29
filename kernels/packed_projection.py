"""The projections of small steps with quantized weights: numbers are streamed as stored and unpacked in registers.

Rows are tokens; knows nothing of sequences, layers or caches.  As `projection`: weight tile @ rows^T, every output
summed in ascending order of the input features within a fixed number of splits, so a row's bits depend on neither the
other rows nor their number.  A product is of whole numbers; scales multiply it in float32, those of groups the sum of
their group, those of outputs the sum of a split.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl

from persimmon.kernels.launch import Limits, max_shared_bytes, next_power_of_2
from persimmon.kernels.layer_norm import TILE_ROWS, exact_launch_options, statistics_shape
from persimmon.kernels.packed_product import packed_total, prefetch_tiles
from persimmon.kernels.packed_weight import FEATURES, PackedWeight, Packing
from persimmon.kernels.projection_config import Norm, Workspace
from persimmon.kernels.projection_ends import check_residual, normed_before, store_or_merge

MAX_ROWS = 256
"""Rows that one launch takes; with more, a matrix that is dequantized once is multiplied faster (predicted)."""


LIMITS = {
    "packed_projection_kernel, 16 rows": Limits(registers=168, shared_bytes=101_376),
    "packed_projection_kernel, 64 rows": Limits(registers=224, shared_bytes=101_376),
}
"""What the kernel's machine code may take; shared memory as sm_86 and sm_89 have it."""

MAX_SPLITS = 8
"""Of `added_config`."""

BLOCK_ROWS = 64
"""Most rows of a program."""

SHARED_BYTES = 48 * 1024
"""What a program's tiles may take up to 16 rows: two programs then share a multiprocessor of sm_86 and sm_89, which has
100 KiB, and four one of sm_90."""

SHARED_BYTES_ALONE = 96 * 1024
"""The same with more rows: one program on a multiprocessor of sm_86 and sm_89, two of sm_90."""


@dataclass(frozen=True, slots=True)
class PackedConfig:
    """How a projection with a packed weight is cut up.

    Attributes:
        splits: ranges of input features that are summed apart; part of the result's rounding, so never chosen by the
            number of rows.
        wide: outputs of a program with more than 16 rows, which all programs read from the L2 cache: 64 or 128.
        warps: of a program.
        stages: iterations in flight, the one in use included; None for as many as fit.
        norm_in_prologue: whether up to 16 rows are normalised by every program on the way in.
    """

    splits: int = 1
    wide: int = 128
    warps: int = 4
    stages: int | None = None
    norm_in_prologue: bool = True

    @staticmethod
    def block_m(rows: int, packing: Packing) -> int:
        """Rows of a program; in columns of 4 bits, whose programs have twice the outputs, half as many at most."""
        most = BLOCK_ROWS // 2 if packing.columns and packing.bits == 4 else BLOCK_ROWS
        return min(most, max(16, next_power_of_2(rows)))

    def block_n(self, block_m: int, packing: Packing) -> int:
        """Outputs of a program with `block_m` rows."""
        return packing.outputs if packing.columns or block_m <= TILE_ROWS else self.wide

    def warps_of(self, block_m: int, packing: Packing) -> int:
        """Of a program with `block_m` rows."""
        # Columns of 8 warps would reach the matrix units by way of shared memory.
        return self.warps * (1 if block_m <= TILE_ROWS or packing.columns else self.block_n(block_m, packing) // 64)

    def split_features(self, in_features: int, packing: Packing) -> int:
        """Input features of a split, whole iterations; the last one may have fewer."""
        iterations = -(-in_features // FEATURES)
        return -(-iterations // self.splits) * FEATURES

    def stages_of(self, block_m: int, packing: Packing, element_size: int, available: int) -> int:
        """Iterations in flight where a program may have `available` bytes of shared memory."""
        weight = self.block_n(block_m, packing) * FEATURES * packing.bits // 8
        tiles = weight + block_m * FEATURES * element_size
        fit = max(2, min(SHARED_BYTES if block_m <= TILE_ROWS else SHARED_BYTES_ALONE, available) // tiles)
        return fit if self.stages is None else min(self.stages, fit)


def workspace_sizes(hidden_size: int) -> tuple[int, int]:
    """Elements of partial sums and of counters that products added to a residual stream of this width take at most."""
    return MAX_SPLITS * MAX_ROWS * hidden_size, -(-hidden_size // 64) * (MAX_ROWS // (BLOCK_ROWS // 2))


def added_config(packing: Packing) -> PackedConfig:
    """For what is added to the residual stream, whose few outputs make few programs."""
    return PackedConfig(splits=4 * packing.outputs // 64)


@triton.jit(do_not_specialize=["num_rows"])
def packed_projection_kernel(
    out,
    x,
    weight,
    scales,
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
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    RUN: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_FEATURES: tl.constexpr,
    NORM_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    STATISTICS_ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N output features over one split of the input features, for BLOCK_M rows; see `project`, `project_add_`."""
    column_tile, split, row_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = split * SPLIT_FEATURES
    if PDL:
        # Weights depend on no launch.  With flags, it is the launch before that decides which of them are read.
        if alive_in is None:
            prefetch_tiles(weight, column_tile, first, IN_FEATURES, BITS, TILE_OUTPUTS, BLOCK_N)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    live_rows = num_rows if live is None else tl.minimum(tl.load(live), num_rows)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    total = packed_total(
        x, weight, scales, rows, rows < num_rows, num_rows, norm_statistics, norm_weight, norm_bias, eps, alive_in,
        column_tile, first, IN_FEATURES, SPLITS, SPLIT_FEATURES, BITS, GROUP, SCALES, WORDS, COLUMNS, UNIT, RUN,
        TILE_OUTPUTS, NORM_TILES, BLOCK_M, BLOCK_N, STAGES,
    )  # fmt: skip
    store_or_merge(
        tl.trans(total), out, bias, statistics, partials, counters, alive_out, column_tile, split, row_block * BLOCK_M,
        live_rows, num_rows, row_block * tl.num_programs(0) + column_tile, OUT_FEATURES, ACTIVATION, RESIDUAL, SPLITS,
        BLOCK_M, BLOCK_N, STATISTICS_ROWS,
    )  # fmt: skip


def project(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    *,
    norm: Norm | None = None,
    activation: Literal["none", "relu_squared"] = "none",
    live: torch.Tensor | None,
    workspace: Workspace,
    config: PackedConfig | None = None,
    dtype: torch.dtype | None = None,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `projection.project`: activation(norm(x) @ weight.T + bias), summed in float32 and rounded once.

    Reads the weight's bytes once for every 64 rows, from the L2 cache where their programs run together.

    Args:
        x: [M, in], M <= 256.
        weight: packed, of shape (out, in).
        bias, norm, activation, workspace, pdl: as there.
        live: as there; None where all rows are.
        config: how to cut it up; without splits where None.
        dtype: of the result; x's where None.

    Returns:
        out [M, out], and for relu_squared of up to 64 rows the flags [out] int8.
    """
    config = config or PackedConfig()
    rows, _ = _check(x, weight, bias)
    x, norm = normed_before(x, norm, in_prologue=config.norm_in_prologue, pdl=pdl)
    out = torch.empty(rows, weight.shape[0], dtype=dtype or x.dtype, device=x.device)
    alive = None
    if activation == "relu_squared" and rows <= BLOCK_ROWS:
        alive = torch.empty(weight.shape[0], dtype=torch.int8, device=x.device)
    _launch(out, x, weight, bias, live, norm, activation, None, alive, None, workspace, config, pdl)
    return out, alive


def project_add_(
    x: torch.Tensor,
    activation: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    *,
    alive: torch.Tensor | None = None,
    live: torch.Tensor | None,
    workspace: Workspace,
    config: PackedConfig | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """As `projection.project_add_`: x += activation @ weight.T + bias in place, and the statistics of the new x.

    Args:
        x: [M, out], M <= 256, the residual stream.
        activation: [M, in].
        weight: packed, of shape (out, in).
        bias, workspace, pdl: as there.
        live: as there; None where all rows are.
        alive: [in] int8; what a weight in columns has for inputs whose flag is 0 is not read.
        config: how to cut it up; `added_config` where None.

    Returns:
        [2, tiles, M] float32.
    """
    config = config or added_config(weight.packing)
    rows, in_features = _check(activation, weight, bias)
    out_features = weight.shape[0]
    check_residual(x, rows, out_features, activation.dtype)
    if alive is not None and (not weight.packing.columns or alive.shape != (in_features,)):
        raise ValueError(f"flags [{in_features}] belong to a weight in columns, not {tuple(alive.shape)}")
    statistics = torch.empty(statistics_shape(rows, out_features), dtype=torch.float32, device=x.device)
    _launch(x, activation, weight, bias, live, None, "none", alive, None, statistics, workspace, config, pdl)
    return statistics


def _check(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> tuple[int, int]:
    """Rows and input features, after making sure that the tensors fit together."""
    rows, in_features = x.shape
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"a projection takes 1 to {MAX_ROWS} rows, not {rows}")
    if weight.shape[1] != in_features:
        raise ValueError(f"a weight of shape {weight.shape} does not take x [{rows}, {in_features}]")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias must have the shape [{weight.shape[0]}], not {tuple(bias.shape)}")
    if not x.is_contiguous():
        raise ValueError(f"x must be contiguous, not strided {x.stride()}")
    return rows, in_features


def _launch(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    live: torch.Tensor | None,
    norm: Norm | None,
    activation: Literal["none", "relu_squared"],
    alive_in: torch.Tensor | None,
    alive_out: torch.Tensor | None,
    statistics: torch.Tensor | None,
    workspace: Workspace,
    config: PackedConfig,
    pdl: bool,
) -> None:
    (rows, in_features), out_features, packing = x.shape, out.shape[1], weight.packing
    residual = statistics is not None
    block_m = config.block_m(rows, packing)
    row_blocks = triton.cdiv(rows, block_m)
    block_n = config.block_n(block_m, packing)
    tiles, splits, warps = triton.cdiv(out_features, block_n), config.splits, config.warps_of(block_m, packing)
    if splits > 1 or residual:
        workspace.check(splits, rows, out_features, tiles * row_blocks)
    packed_projection_kernel[(tiles, splits, row_blocks)](
        out,
        x,
        weight.numbers,
        weight.scales,
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
        **packing.constants,
        ACTIVATION=activation,
        RESIDUAL=residual,
        SPLITS=splits,
        SPLIT_FEATURES=config.split_features(in_features, packing),
        NORM_TILES=next_power_of_2(norm.statistics.shape[1]) if norm else 1,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        STAGES=config.stages_of(block_m, packing, x.element_size(), max_shared_bytes(x.device)),
        # A warp always sums the statistics of four rows: their bits depend on the order.
        STATISTICS_ROWS=TILE_ROWS * warps // 4,
        PDL=pdl,
        num_warps=warps,
        # As many as leave room for the programs of a multiprocessor; without a number, ptxas spills to stay below 128.
        maxnreg=168 if block_m <= TILE_ROWS else 224,
        **exact_launch_options(pdl),
    )
