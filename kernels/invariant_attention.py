"""Attention with the same bits for a token that is decoded and for one that is part of a chunk of any size.

Knows the paged cache of one layer; nothing of layers, requests or scheduling.

Every query is a row of a tile of the same shape, whether the tile holds 64 tokens of a chunk or one decode and nothing
else, and meets its keys in the same order: an online softmax over the tiles of a split of 256 keys, one state for each
split, and the states joined in ascending order.  A chunk's program takes all splits of its queries one after the other.
A decode's splits are programs of their own, of which the one that finishes last joins them.  Keys behind a query's own
position weigh exactly zero, so the other rows of the tile change none of its bits.
"""

import math

import torch
import triton
import triton.language as tl

from persimmon.kernels.cached_rows import check_cache, scale_pairs
from persimmon.kernels.chunk_plan import ChunkPlan, PrefillConfig
from persimmon.kernels.decode_work import SPLIT_TOKENS, DecodeWorkspace
from persimmon.kernels.launch import Limits, num_sms
from persimmon.kernels.layer_norm import exact_launch_options
from persimmon.kernels.operands import LayerCache
from persimmon.kernels.prefill_attention import attend

LIMITS = {
    "_chunk_attention_kernel": Limits(registers=255, shared_bytes=80 * 1024),
    "_split_attention_kernel": Limits(registers=255, shared_bytes=80 * 1024),
}
"""What the kernels' machine code may take."""

_LOWEST = tl.constexpr(-3.0e38)

CONFIG = PrefillConfig(block_queries=64, block_keys=64, warps=4, stages=3)
"""Tile of all queries of 16-bit elements: on sm_90 the smallest that wgmma multiplies; not yet run on a GPU."""

FLOAT32_CONFIG = PrefillConfig(block_queries=16, block_keys=16, warps=4, stages=1)
"""The same for float32, which the tensor cores do not multiply; with two stages sm_100 spills registers."""

_PROGRAMS_PER_SM = 4
"""Programs of the decodes' persistent grid that a multiprocessor of sm_90 holds at once, by their shared memory."""


def config_of(dtype: torch.dtype) -> PrefillConfig:
    """The one tile shape for queries of a type: with two, a token's bits would depend on who shares its step."""
    return FLOAT32_CONFIG if dtype == torch.float32 else CONFIG


@triton.jit
def _join(maximum, total, weighted, new_maximum, new_total, new_weighted):
    """Row by row, the softmax states of keys and of later keys become the state of both."""
    higher = tl.maximum(maximum, new_maximum)
    keep, add = tl.exp2(maximum - higher), tl.exp2(new_maximum - higher)
    return higher, total * keep + new_total * add, weighted * keep[:, None] + new_weighted * add[:, None]


@triton.jit
def _attended(total, weighted):
    """The output of a state.  Adding 0 turns -0 into 0, as joining a split in which a query sees no key may."""
    return weighted / total[:, None] + 0.0


@triton.jit
def _empty_state(ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The softmax state of no keys; finite, because the difference of two infinities is NaN."""
    maximum = tl.full([ROWS], _LOWEST, tl.float32)
    return maximum, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, HEAD_DIM], tl.float32)


@triton.jit
def _split_state(
    q,
    positions,
    split,
    end,
    k_cache,
    v_cache,
    cache_scales,
    head,
    block_table,
    score_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The softmax state of a tile's queries over the keys of one split, as far as `end`."""
    maximum, total, weighted = _empty_state(BLOCK_Q, HEAD_DIM)
    first = split * SPLIT
    return attend(
        q, positions, maximum, total, weighted, k_cache, v_cache, cache_scales, head, block_table,
        first, tl.minimum(first + SPLIT, end), score_scale, HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_K, STAGES, True,
    )  # fmt: skip


# The table's width changes with the longest sequence, and must not compile anew.
@triton.jit(do_not_specialize=["table_width"])
def _chunk_attention_kernel(
    queries,
    k_cache,
    v_cache,
    cache_scales,
    out,
    tiles,
    query_starts,
    starts,
    block_tables,
    table_width,
    score_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One head of one tile of a chunk's queries, over all their keys; see `chunk_attention`."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0)
    sequence = tl.load(tiles + 2 * tl.program_id(1)).to(tl.int64)
    first = tl.load(tiles + 2 * tl.program_id(1) + 1)
    first_token = tl.load(query_starts + sequence)
    count = tl.load(query_starts + sequence + 1) - first_token
    start = tl.load(starts + sequence)

    query = first + tl.arange(0, BLOCK_Q)
    live = query[:, None] < count
    rows = (first_token + query).to(tl.int64) * HEADS + head
    places = rows[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    q = tl.load(queries + places, mask=live, other=0.0)

    block_table = block_tables + sequence * table_width
    end = start + tl.minimum(first + BLOCK_Q, count)
    maximum, total, weighted = _empty_state(BLOCK_Q, HEAD_DIM)
    for split in tl.range(0, tl.cdiv(end, SPLIT)):
        new_maximum, new_total, new_weighted = _split_state(
            q, start + query, split, end, k_cache, v_cache, cache_scales, head, block_table, score_scale,
            HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_Q, BLOCK_K, SPLIT, STAGES,
        )  # fmt: skip
        maximum, total, weighted = _join(maximum, total, weighted, new_maximum, new_total, new_weighted)
    tl.store(out + places, _attended(total, weighted).to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["table_width"])
def _split_attention_kernel(
    queries,
    k_cache,
    v_cache,
    cache_scales,
    out,
    lengths,
    block_tables,
    table_width,
    num_items,
    item_sequences,
    item_splits,
    first_splits,
    partial_outputs,
    partial_maxima,
    partial_totals,
    arrivals,
    score_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs take turns at the (item, head) pairs; the query is the first row of its tile; see `decode_attention`."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    is_query = tl.arange(0, BLOCK_Q) == 0
    row = tl.arange(0, 1)
    dims = tl.arange(0, HEAD_DIM)[None, :]
    num_work = tl.load(num_items) * HEADS
    for work in tl.range(tl.program_id(0), num_work, tl.num_programs(0), disable_licm=True):
        item, head = work // HEADS, work % HEADS
        sequence = tl.load(item_sequences + item)
        split = tl.load(item_splits + item)
        length = tl.load(lengths + sequence)
        token = sequence.to(tl.int64) * HEADS + head
        places = token * HEAD_DIM + dims
        q = tl.load(queries + tl.broadcast_to(places, [BLOCK_Q, HEAD_DIM]), mask=is_query[:, None], other=0.0)
        maximum, total, weighted = _split_state(
            q, tl.where(is_query, length - 1, -1), split, length, k_cache, v_cache, cache_scales, head,
            block_tables + sequence.to(tl.int64) * table_width, score_scale,
            HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_Q, BLOCK_K, SPLIT, STAGES,
        )  # fmt: skip
        splits = tl.cdiv(length, SPLIT)
        if splits == 1:
            own = tl.broadcast_to(out + places, [BLOCK_Q, HEAD_DIM])
            tl.store(own, _attended(total, weighted).to(out.dtype.element_ty), mask=is_query[:, None])
        else:
            first_row = tl.load(first_splits + sequence).to(tl.int64) * HEADS + head * splits
            mine = tl.full([BLOCK_Q], 0, tl.int64) + first_row + split
            tl.store(partial_outputs + mine[:, None] * HEAD_DIM + dims, weighted, mask=is_query[:, None])
            tl.store(partial_maxima + mine, maximum, mask=is_query)
            tl.store(partial_totals + mine, total, mask=is_query)
            # All of this program's threads have stored before one of them counts the arrival.
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals + token, 1, sem="acq_rel", scope="gpu")
            if arrived == splits - 1:
                all_maximum, all_total, all_weighted = _empty_state(1, HEAD_DIM)
                for other in range(splits):
                    # Other multiprocessors wrote these during this launch: .cg reads them from L2, past a stale L1.
                    theirs = first_row + other + row
                    own_maximum = tl.load(partial_maxima + theirs, cache_modifier=".cg")
                    own_total = tl.load(partial_totals + theirs, cache_modifier=".cg")
                    own_weighted = tl.load(partial_outputs + theirs[:, None] * HEAD_DIM + dims, cache_modifier=".cg")
                    all_maximum, all_total, all_weighted = _join(
                        all_maximum, all_total, all_weighted, own_maximum, own_total, own_weighted
                    )
                tl.store(out + places, _attended(all_total, all_weighted).to(out.dtype.element_ty))
                tl.store(arrivals + token, 0)


def chunk_attention(
    q: torch.Tensor, cache: LayerCache, plan: ChunkPlan, *, out: torch.Tensor, pdl: bool = False
) -> torch.Tensor:
    """Causal softmax(q k^T / sqrt(D)) v of every chunk over its own sequence's blocks.

    The maths and the bytes of `prefill_attention.prefill_attention`; each query's sums are grouped by 256 keys, as
    those of `decode_attention` are.

    Args:
        q: [T, H, D] contiguous, as `qk_norm_rotary_store` made them.
        cache: the layer's, contiguous, this step's keys and values stored already.
        plan: the step's chunks, in tiles of `config_of(q.dtype)`.
        out: [T, H * D] contiguous in q's dtype, written.
        pdl: whether the kernel may start while its predecessor ends (sm_90 and later).

    Returns:
        out.
    """
    heads, dim = q.shape[1:]
    config = config_of(q.dtype)
    _check(q, cache, out, len(plan.slots))
    if any(launch.config != config for launch in plan.launches):
        raise ValueError(f"the plan's tiles are {[launch.config for launch in plan.launches]}, not {config}")
    for launch in plan.launches:
        _chunk_attention_kernel[(heads, launch.tiles.shape[0])](
            q,
            cache.keys,
            cache.values,
            scale_pairs(cache),
            out,
            launch.tiles,
            plan.query_starts,
            plan.starts,
            plan.block_tables,
            plan.block_tables.shape[1],
            math.log2(math.e) / math.sqrt(dim),
            PDL=pdl,
            **_shape(heads, dim, cache, config),
            **exact_launch_options(pdl),
        )
    return out


def decode_attention(
    q: torch.Tensor,
    cache: LayerCache,
    lengths: torch.Tensor,
    block_tables: torch.Tensor,
    workspace: DecodeWorkspace,
    *,
    out: torch.Tensor,
    pdl: bool = False,
) -> torch.Tensor:
    """Attention of the last token of each sequence over all of its tokens: the bits of `chunk_attention`.

    Reads 2 * D * e bytes of K and V for each head and token, with elements of e bytes; where a sequence has n > 1
    splits, another 4 * (D + 2) * n for each head are written and read, which the L2 cache holds.

    Args:
        q: [B, H, D] contiguous, as `qk_norm_rotary_store` made them.
        cache: the layer's, contiguous, this step's keys and values stored already.
        lengths: [B] int32, as `build_work_list` was given them; 0 for padding.
        block_tables: [B, W] int32.
        workspace: holds the step's work list.
        out: [B, H * D] contiguous in q's dtype, written except where the length is 0.
        pdl: whether the kernel may start while its predecessor ends (sm_90 and later).

    Returns:
        out.
    """
    sequences, heads, dim = q.shape
    _check(q, cache, out, len(lengths))
    if sequences > workspace.max_sequences or workspace.partial_outputs.shape[1] != dim:
        raise ValueError(
            f"{sequences} sequences of heads of {dim}; the workspace is for at most {workspace.max_sequences} "
            f"sequences of heads of {workspace.partial_outputs.shape[1]}"
        )
    most_work = sequences * workspace.max_splits * heads
    _split_attention_kernel[(min(num_sms(q.device) * _PROGRAMS_PER_SM, most_work),)](
        q,
        cache.keys,
        cache.values,
        scale_pairs(cache),
        out,
        lengths,
        block_tables,
        block_tables.shape[1],
        *workspace.tensors,
        math.log2(math.e) / math.sqrt(dim),
        PDL=pdl,
        **_shape(heads, dim, cache, config_of(q.dtype)),
        **exact_launch_options(pdl),
    )
    return out


def _shape(heads: int, dim: int, cache: LayerCache, config: PrefillConfig) -> dict[str, int]:
    """The constants of both kernels: a row has the same bits from both only because these are the same."""
    return {
        "HEADS": heads,
        "HEAD_DIM": dim,
        "BLOCK_SIZE": cache.block_size,
        "BLOCK_Q": config.block_queries,
        "BLOCK_K": config.block_keys,
        "SPLIT": SPLIT_TOKENS,
        "STAGES": config.stages,
        "num_warps": config.warps,
    }


def _check(q: torch.Tensor, cache: LayerCache, out: torch.Tensor, tokens: int) -> None:
    heads, dim = q.shape[1:]
    if len(q) != tokens or out.shape != (tokens, heads * dim) or out.dtype != q.dtype:
        raise ValueError(f"q {[*q.shape]} {q.dtype} and out {[*out.shape]} {out.dtype} do not hold {tokens} tokens")
    check_cache(cache, heads, dim, q.dtype)
    if not q.is_contiguous() or not out.is_contiguous():
        raise ValueError("q and out must be contiguous")
