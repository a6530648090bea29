"""lm_head with draws in the epilogue of its product, of weights as they are stored: 16 or 32 bits, or quantized.

Knows nothing of truncation, penalties or requests.  What a draw depends on is stated in `sampling`.
"""

import torch
import triton
import triton.language as tl

from persimmon.kernels.launch import Limits, launch_options, max_shared_bytes, next_power_of_2
from persimmon.kernels.operands import DrawInputs
from persimmon.kernels.packed_product import packed_total
from persimmon.kernels.packed_weight import FEATURES, PackedWeight
from persimmon.kernels.sampling import (
    LOG2_E,
    NO_TOKEN,
    SamplingConfig,
    Workspace,
    check_rows,
    gumbel_from_word,
    merge,
)

LIMITS = {
    "_head_kernel, sm_80": Limits(registers=132, shared_bytes=113_000),
    "_head_kernel, sm_90": Limits(registers=148, shared_bytes=113_000),
    "_head_kernel, sm_100": Limits(registers=248, shared_bytes=113_000),
    "_head_kernel, quantized": Limits(registers=255, shared_bytes=101_376),
}
"""Most that the machine code may take; shared memory of quantized weights as sm_86 and sm_89 have it."""

PACKED_SHARED_BYTES = 96 * 1024
"""What a program's tiles of quantized weights may take."""

_NOT_PACKED: dict[str, int | str] = dict.fromkeys(
    ("BITS", "GROUP", "SCALES", "WORDS", "COLUMNS", "UNIT", "RUN", "TILE_OUTPUTS"), 0
)
"""In place of `Packing.constants`."""


@triton.jit
def _draw(
    x,
    tile,
    row,
    is_live,
    temperature,
    seed,
    sample_index,
    position,
    wants_logits,
    logits,
    scores,
    winner_ids,
    winner_logits,
    maxima,
    sums,
    vocab_size,
    tiles,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """What one tile of logits x [BLOCK_N, BLOCK_M] float32 leaves for the merge, and the logits that rows want."""
    ids = (tile * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    x = tl.where((ids < vocab_size) & (x == x), x, float("-inf"))
    if logits is not None:
        wanted = is_live & (tl.load(wants_logits + row, mask=is_live, other=0) != 0)
        out = logits + row.to(tl.int64)[None, :] * vocab_size + ids
        tl.store(out, x, mask=wanted[None, :] & (ids < vocab_size))

    group = tile * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
    own_seed = tl.load(seed + row, mask=is_live, other=0)
    own_index = tl.load(sample_index + row, mask=is_live, other=0)
    own_position = tl.load(position + row, mask=is_live, other=0)
    w0, w1, w2, w3 = tl.philox(
        own_seed[None, :],
        group[:, None],
        own_position[None, :],
        own_index[None, :],
        tl.zeros((1, 1), dtype=tl.int32),
    )
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    noise = gumbel_from_word(tl.reshape(tl.permute(words, (0, 3, 2, 1)), (BLOCK_N, BLOCK_M)))
    score = x + tl.load(temperature + row, mask=is_live, other=0.0)[None, :] * noise

    best = tl.max(score, axis=0)
    winner = tl.min(tl.where(score == best[None, :], ids, NO_TOKEN), axis=0)
    winner_logit = tl.max(tl.where(ids == winner[None, :], x, float("-inf")), axis=0)
    maximum = tl.max(x, axis=0)
    # In whole numbers the order of the sum cannot matter, and that order is the compiler's choice for each BLOCK_M.
    share = tl.where(x == maximum[None, :], 1.0, tl.exp2((x - maximum[None, :]) * LOG2_E))
    one: tl.constexpr = 2**30 // BLOCK_N
    total = tl.sum((share * one + 0.5).to(tl.int32), axis=0)

    entry = row.to(tl.int64) * tiles + tile
    tl.store(scores + entry, best, mask=is_live)
    tl.store(winner_ids + entry, winner, mask=is_live)
    tl.store(winner_logits + entry, winner_logit, mask=is_live)
    tl.store(maxima + entry, maximum, mask=is_live)
    tl.store(sums + entry, total.to(tl.float32) / one, mask=is_live)


@triton.jit
def _dense_total(
    hidden,
    weight,
    tile,
    row,
    is_live,
    vocab_size,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """[BLOCK_N, BLOCK_M] float32: a tile of logits."""
    id_ = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Ids beyond the vocabulary read its last row, and cannot win below: the loads need no mask.
    weight_rows = weight + tl.minimum(id_, vocab_size - 1).to(tl.int64)[:, None] * K
    hidden_rows = hidden + row.to(tl.int64)[:, None] * K
    x = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if K % BLOCK_K == 0:
            w = tl.load(weight_rows + (first + k)[None, :])
            h = tl.load(hidden_rows + (first + k)[None, :], mask=is_live[:, None], other=0.0)
        else:
            inside = (first + k)[None, :] < K
            w = tl.load(weight_rows + (first + k)[None, :], mask=inside, other=0.0)
            h = tl.load(hidden_rows + (first + k)[None, :], mask=is_live[:, None] & inside, other=0.0)
        x = tl.dot(w, tl.trans(h), x, input_precision="ieee")
    return x


@triton.jit(do_not_specialize=["rows"])
def _head_kernel(
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
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    RUN: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of token ids for up to BLOCK_M rows; see `sample_head`.  Where there are scales the weight is packed."""
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
    if scales is None:
        x = _dense_total(hidden, weight, tile, row, is_live, vocab_size, K, BLOCK_N, BLOCK_M, BLOCK_K, STAGES)
    else:
        x = packed_total(
            hidden, weight, scales, row, is_live, rows, None, None, None, 0.0, None, tile, 0, K, 1, PADDED_K, BITS,
            GROUP, SCALES, WORDS, COLUMNS, UNIT, RUN, TILE_OUTPUTS, 1, BLOCK_M, BLOCK_N, STAGES,
        )  # fmt: skip
    _draw(
        x, tile, row, is_live, temperature, seed, sample_index, position, wants_logits, logits, scores, winner_ids,
        winner_logits, maxima, sums, vocab_size, tiles, BLOCK_N, BLOCK_M,
    )  # fmt: skip


def sample_head(
    hidden: torch.Tensor,
    head: torch.Tensor | PackedWeight,
    draw: DrawInputs,
    live: torch.Tensor,
    workspace: Workspace,
    *,
    logits: torch.Tensor | None = None,
    config: SamplingConfig | None = None,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits = hidden @ head.T and a token drawn from them, without the logits ever being written.

    The token is the argmax of logit + temperature * Gumbel noise, which is a draw from softmax(logits / temperature)
    (the Gumbel-max trick, in the projection's epilogue as in FlashSampling, arXiv:2603.15854); the noise is
    `reference_sampling.gumbel`.  Temperature 0 is greedy, the lowest id among equals.  A NaN counts as -inf.

    Reads head.nbytes once for each config.head_rows rows, and for each tile R * K * itemsize of hidden from the L2
    cache; writes and reads back 20 * R * ceil(vocab_size / head_tokens) bytes, and writes 4 * vocab_size for each row
    that wants its logits.  Above 64 rows a plain matmul and `sample_logits` take over where the head is not quantized:
    two tiles of rows would share each weight through the L2 cache at best.

    Args:
        hidden: [R, K] contiguous, normalised, float16, bfloat16 or float32.
        head: [vocab_size, K] contiguous, hidden's dtype; or packed rows, of shape (vocab_size, K).
        draw: R rows of it.
        live: [1] int32; rows from there on are padding, are not read and get no token.
        workspace: for R rows or more; its results are what is returned.
        logits: [R, vocab_size] float32, written where `draw.wants_logits` says so; None when no row does.
        config: launch settings; the defaults where None.
        pdl: whether the launch overlaps the end of its predecessor.

    Returns:
        tokens [R] int64, and their log-probabilities [R] float32 under softmax(logits), that is without temperature.

    Raises:
        ValueError: the workspace has room for fewer rows, or a packed head is not one for such hidden states.
    """
    config = config or SamplingConfig()
    rows, depth = hidden.shape
    check_rows(rows, workspace)
    vocab_size = head.shape[0]
    tiles = triton.cdiv(vocab_size, config.head_tokens)
    block_m = min(max(16, next_power_of_2(rows)), config.head_rows)
    row_blocks = triton.cdiv(rows, block_m)
    numbers, scales, constants, stages = head, None, _NOT_PACKED, config.head_stages
    if isinstance(head, PackedWeight):
        packing = head.packing
        if packing.columns or head.shape[1] != depth or config.head_tokens % packing.outputs:
            raise ValueError(
                f"a head of shape {head.shape} in {head.format} does not take hidden states [{rows}, {depth}]"
            )
        numbers, scales, constants = head.numbers, head.scales, packing.constants
        taken = FEATURES * (config.head_tokens * packing.bits // 8 + block_m * hidden.element_size())
        stages = max(2, min(stages, min(PACKED_SHARED_BYTES, max_shared_bytes(hidden.device)) // taken))
    _head_kernel[(tiles * row_blocks,)](
        hidden,
        numbers,
        scales,
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
        BLOCK_N=config.head_tokens,
        BLOCK_M=block_m,
        BLOCK_K=config.head_depth_bytes // hidden.element_size(),
        PADDED_K=triton.cdiv(depth, FEATURES) * FEATURES,
        **constants,
        STAGES=stages,
        PDL=pdl,
        num_warps=config.head_warps if block_m <= 32 else 2 * config.head_warps,
        **launch_options(pdl),
    )
    return merge(workspace, None, live, rows, tiles, config=config, pdl=pdl)
