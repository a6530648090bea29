"""The output projection with quantized weights and draws in its epilogue: `sampling.sample_head` for packed ones."""

import torch
import triton
import triton.language as tl

from persimmon.kernels.launch import Limits, launch_options, max_shared_bytes, next_power_of_2
from persimmon.kernels.operands import DrawInputs
from persimmon.kernels.packed_product import packed_total
from persimmon.kernels.packed_weight import FEATURES, PackedWeight
from persimmon.kernels.sampling import SamplingConfig, Workspace, check_rows, draw_from_tile, merge

LIMITS = {
    "packed_head_kernel": Limits(registers=255, shared_bytes=101_376),
}
"""Most that the machine code may take; shared memory as sm_86 and sm_89 have it."""

SHARED_BYTES = 96 * 1024
"""What a program's tiles may take."""


@triton.jit(do_not_specialize=["rows"])
def packed_head_kernel(
    hidden,
    weight,
    scales,
    temperature,
    seed,
    sample_index,
    position,
    wants_logits,
    live,
    logits,
    scores,
    winner_ids,
    winner_logits,
    maxima,
    sums,
    vocab_size,
    tiles,
    row_blocks,
    rows,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    WORDS: tl.constexpr,
    UNIT: tl.constexpr,
    RUN: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of token ids for up to BLOCK_M rows; see `sample_head`."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # Row blocks of one tile are neighbours, so that the second finds the weights in the L2 cache.
    tile = tl.program_id(0) // row_blocks
    first_row = (tl.program_id(0) % row_blocks) * BLOCK_M
    live_rows = tl.minimum(tl.load(live), rows)
    if first_row >= live_rows:
        return
    row = first_row + tl.arange(0, BLOCK_M)
    is_live = row < live_rows
    x = packed_total(
        hidden, weight, scales, row, is_live, rows, None, None, None, 0.0, None, tile, 0, K, 1, PADDED_K, BITS, GROUP,
        SCALES, WORDS, False, UNIT, RUN, TILE_OUTPUTS, 1, BLOCK_M, BLOCK_N, STAGES,
    )  # fmt: skip
    draw_from_tile(
        x, tile, row, is_live, temperature, seed, sample_index, position, wants_logits, logits, scores, winner_ids,
        winner_logits, maxima, sums, vocab_size, tiles, BLOCK_N, BLOCK_M,
    )  # fmt: skip


def sample_head(
    hidden: torch.Tensor,
    head: PackedWeight,
    draw: DrawInputs,
    live: torch.Tensor,
    workspace: Workspace,
    *,
    logits: torch.Tensor | None = None,
    config: SamplingConfig | None = None,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `sampling.sample_head`, with the head's numbers read as they are stored: head.nbytes for each 64 rows.

    Args:
        hidden: [R, K] contiguous, normalised, float16, bfloat16 or float32.
        head: packed rows, of shape (vocab_size, K).
        draw, live, workspace, logits, config, pdl: as there.

    Returns:
        tokens [R] int64, and their log-probabilities [R] float32.
    """
    config = config or SamplingConfig()
    (rows, depth), (vocab_size, head_depth), packing = hidden.shape, head.shape, head.packing
    check_rows(rows, workspace)
    if packing.columns or head_depth != depth or config.head_tokens % packing.outputs:
        raise ValueError(f"a head of shape {head.shape} in {head.format} does not take hidden states [{rows}, {depth}]")
    tiles = triton.cdiv(vocab_size, config.head_tokens)
    block_m = min(max(16, next_power_of_2(rows)), config.head_rows)
    row_blocks = triton.cdiv(rows, block_m)
    taken = FEATURES * (config.head_tokens * packing.bits // 8 + block_m * hidden.element_size())
    fit = min(SHARED_BYTES, max_shared_bytes(hidden.device)) // taken
    packed_head_kernel[(tiles * row_blocks,)](
        hidden,
        head.numbers,
        head.scales,
        draw.temperature,
        draw.seed,
        draw.sample_index,
        draw.position,
        draw.wants_logits,
        live,
        logits,
        workspace.scores,
        workspace.ids,
        workspace.winner_logits,
        workspace.maxima,
        workspace.sums,
        vocab_size,
        tiles,
        row_blocks,
        rows,
        K=depth,
        PADDED_K=packing.padded(head.shape)[1],
        BITS=packing.bits,
        GROUP=packing.group or 0,
        SCALES=packing.scale_kind,
        WORDS=packing.words,
        UNIT=packing.unit,
        RUN=packing.run,
        TILE_OUTPUTS=packing.outputs,
        BLOCK_N=config.head_tokens,
        BLOCK_M=block_m,
        STAGES=max(2, min(config.head_stages, fit)),
        PDL=pdl,
        num_warps=config.head_warps if block_m <= 32 else 2 * config.head_warps,
        **launch_options(pdl),
    )
    return merge(workspace, None, live, rows, tiles, config=config, pdl=pdl)
