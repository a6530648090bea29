"""Decode attention: QK-norm, rotary, cache write and split-KV attention over pages, in one launch a layer.

Knows rows of one new token each and the paged cache of one layer; knows nothing of prompts, projections or scheduling.
Shapes use B for decoding sequences, H for heads, D for head_dim, R for rotary dimensions, N for blocks in the cache,
S for tokens in a block and W for the width of a block table.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from persimmon.kernels.cached_rows import (
    cache_row,
    check_cache,
    key_scale,
    magnitude_bits,
    narrowed,
    scale_bits,
    scale_pairs,
    scaled_to_int8,
    value_scale,
)
from persimmon.kernels.decode_work import SPLIT_TOKENS, DecodeWorkspace
from persimmon.kernels.launch import Limits, launch_options, num_sms
from persimmon.kernels.operands import LayerCache
from persimmon.kernels.prefetch import LINE_BYTES, prefetch_lines

AHEAD_BYTES = 16 * 1024 * 1024
"""Most of the next weight that programs without work bring into the L2 cache.

About what an H100 reads in the 5 us of a short attention; half of its L2 cache is 25 MB, all that one side of the chip
reaches directly.
"""

LIMITS = {
    "_decode_attention": Limits(registers=128, shared_bytes=56 * 1024),
}

_PROGRAMS_PER_SM = {
    torch.float16: 6,
    torch.bfloat16: 5,
    torch.float32: 4,
    torch.int8: 6,
    torch.float8_e4m3fn: 5,
}
"""Programs of the default launch that are on a multiprocessor of sm_90 at once; by its machine code."""

_MAX_TILE = 32
# Where a running maximum starts: below any score, and finite, because -inf - -inf is NaN.
_LOWEST = tl.constexpr(-1e30)
# What a launch does of its rows: all of it, only store their keys and values, or all but that.
_WHOLE = 0
_STORE = tl.constexpr(1)
_ATTEND = tl.constexpr(2)


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the kernel is launched.

    Attributes:
        warps: of a program.  They decide in which order the rows of a tile are added up at the end of a split, so two
            runs give the same bits only with the same number; the others change nothing but speed.
        stages: of the loop over pages.  A page's number is loaded stages - 1 tiles before its K and V, which are in
            flight while the stages - 1 tiles before them are used.
        programs_per_sm: of the persistent grid; None for as many as fit, by registers and shared memory.  More would
            begin when the others end, each with its whole share of the work still to do.
    """

    warps: int = 4
    stages: int = 4
    programs_per_sm: int | None = None


@triton.jit
def _query_key_value(
    token, norm_weight, norm_bias, eps, cos, sin, D: tl.constexpr, HALF: tl.constexpr, HAS_NORM: tl.constexpr
):
    """One token's head in float32, [4, D]: q and k after LayerNorm and rotary, v as it is, zeros.

    `cos` and `sin` point at the token's angles.  The rows are one tile because then one pass loads them, takes the
    statistics of both norms and turns both.
    """
    row = tl.arange(0, 4)[:, None]
    dim = tl.arange(0, D)[None, :]
    is_qk = row < 2
    place = row * D + dim
    x = tl.load(token + place, mask=row < 3, other=0.0).to(tl.float32)
    if HAS_NORM:
        weight = tl.load(norm_weight + place, mask=is_qk, other=0.0).to(tl.float32)
        bias = tl.load(norm_bias + place, mask=is_qk, other=0.0).to(tl.float32)
        centred = x - (tl.sum(x, 1) / D)[:, None]
        scale = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
        x = tl.where(is_qk, centred * scale[:, None] * weight + bias, x)
    rotates = is_qk & (dim < 2 * HALF)
    angle = tl.broadcast_to(dim % HALF, [4, D])
    cosine = tl.load(cos + angle, mask=rotates, other=1.0)
    sine = tl.load(sin + angle, mask=rotates, other=0.0)
    partner = tl.where(dim < HALF, dim + HALF, tl.where(dim < 2 * HALF, dim - HALF, dim))
    turned = tl.gather(x, tl.broadcast_to(partner, [4, D]), 1)
    return tl.where(rotates, x * cosine + turned * tl.where(dim < HALF, -sine, sine), x)


@triton.jit
def _add(maxima, totals, outputs, new_maxima, new_totals, new_outputs, new_scales):
    """Row by row, the softmax states of two disjoint sets of tokens become the state of their union.

    The new outputs are multiplied by `new_scales`.
    """
    higher = tl.maximum(maxima, new_maxima)
    keep, add = tl.exp2(maxima - higher), tl.exp2(new_maxima - higher)
    totals = totals * keep + new_totals * add
    return higher, totals, outputs * keep[:, None] + new_outputs * (add * new_scales)[:, None]


@triton.jit
def _merge(maxima, totals, outputs):
    """Softmax states of disjoint sets of tokens, [n], [n] and [n, D], become the state of their union."""
    maximum = tl.max(maxima, 0)
    factor = tl.exp2(maxima - maximum)
    return maximum, tl.sum(totals * factor, 0), tl.sum(outputs * factor[:, None], 0)


@triton.jit
def _merge_splits(
    partial_outputs, partial_maxima, partial_totals, first_row, splits, D: tl.constexpr, SPLITS: tl.constexpr
):
    """The attention output [D] of a sequence's head from its splits, rows first_row to first_row + splits."""
    dim = tl.arange(0, D)
    lane = tl.arange(0, SPLITS)
    maxima = tl.full([SPLITS], _LOWEST, tl.float32)
    totals = tl.zeros([SPLITS], tl.float32)
    outputs = tl.zeros([SPLITS, D], tl.float32)
    for start in range(0, splits, SPLITS):
        live = start + lane < splits
        row = first_row + start + lane
        # Other multiprocessors wrote these during this launch: .cg reads them from L2, past a stale L1.
        new_maxima = tl.load(partial_maxima + row, mask=live, other=_LOWEST, cache_modifier=".cg")
        new_totals = tl.load(partial_totals + row, mask=live, other=0.0, cache_modifier=".cg")
        place = row[:, None] * D + dim[None, :]
        new_outputs = tl.load(partial_outputs + place, mask=live[:, None], other=0.0, cache_modifier=".cg")
        maxima, totals, outputs = _add(maxima, totals, outputs, new_maxima, new_totals, new_outputs, 1.0)
    _, total, output = _merge(maxima, totals, outputs)
    return output / total


# One binary does every part, because a row's bits must not depend on which launches compute it.
@triton.jit(do_not_specialize=["table_width", "part"])
def _decode_attention(
    out,
    qkv,
    norm_weight,
    norm_bias,
    cos,
    sin,
    k_cache,
    v_cache,
    cache_scales,
    lengths,
    block_tables,
    num_items,
    item_sequences,
    item_splits,
    first_splits,
    partial_outputs,
    partial_maxima,
    partial_totals,
    arrivals,
    ahead,
    eps,
    score_scale,
    table_width,
    part,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BY_ROW: tl.constexpr,
    AHEAD_LINES: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs take turns at the (item, head) pairs: see `decode_attention`.

    Where rows are only stored, `num_items` counts rows, and the item of each is its last split.

    The softmax state is kept for every row of the tile by itself, TILE states instead of one: no iteration then
    needs a reduction across warps, and they are merged once at the end of the split.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.arange(0, TILE)
    dim = tl.arange(0, D)
    in_tile = slot[:, None] * D + dim[None, :]
    nothing = tl.zeros([TILE, D], k_cache.dtype.element_ty)
    stores_only = part == _STORE
    num_work = tl.load(num_items) * H
    for work in tl.range(tl.program_id(0), num_work, tl.num_programs(0), disable_licm=True):
        item, head = work // H, work % H
        sequence = tl.where(stores_only, item, tl.load(item_sequences + item))
        length = tl.load(lengths + sequence)
        # A row of padding is in no item, and is only passed over where rows are stored.
        position = tl.maximum(length - 1, 0)
        split = tl.where(stores_only, position // SPLIT, tl.load(item_splits + item))
        table = block_tables + sequence * table_width
        token = sequence.to(tl.int64) * H + head
        angles = (sequence if BY_ROW else position) * HALF
        rows = _query_key_value(
            qkv + token * (3 * D), norm_weight, norm_bias, eps, cos + angles, sin + angles, D, HALF, HAS_NORM
        )
        q = tl.gather(tl.reshape(rows, [4 * D]), dim, 0) * score_scale

        maxima = tl.full([TILE], _LOWEST, tl.float32)
        totals = tl.zeros([TILE], tl.float32)
        outputs = tl.zeros([TILE, D], tl.float32)
        begin = split * SPLIT
        end = tl.where(stores_only, begin, tl.minimum(begin + SPLIT, position))
        if position < begin + SPLIT:
            # The new token is this split's: its row of the tile starts from it, and it goes into the cache.
            stores = (length > 0) & (part != _ATTEND)
            row = cache_row(tl.load(table + position // S), head, position % S, H, S)
            which = tl.arange(0, 4)
            if cache_scales is not None:
                bits = scale_bits(tl.max(magnitude_bits(rows), 1))
                pair = tl.sum(tl.where(which == 1, bits, tl.where(which == 2, bits << 16, 0)), 0)
                tl.store(cache_scales + row, pair, mask=stores)
                rows = scaled_to_int8(rows, key_scale(bits)[:, None])
            stored = narrowed(rows, k_cache.dtype.element_ty)
            place = tl.broadcast_to(dim[None, :], [4, D]) + row * D
            tl.store(k_cache + place, stored, mask=stores & (which[:, None] == 1))
            tl.store(v_cache + place, stored, mask=stores & (which[:, None] == 2))
            flat = tl.reshape(stored.to(tl.float32), [4 * D])
            k, v = tl.gather(flat, D + dim, 0), tl.gather(flat, 2 * D + dim, 0)
            own = slot == position % TILE
            score = tl.sum(tl.where(own[:, None], k[None, :], 0.0) * q[None, :], 1)
            if cache_scales is not None:
                score *= key_scale(pair)
                v *= value_scale(pair)
            maxima = tl.where(own, score, maxima)
            totals = own.to(tl.float32)
            outputs = tl.where(own[:, None], v[None, :], outputs)

        for start in tl.range(begin, end, TILE, num_stages=STAGES):
            row = cache_row(tl.load(table + start // S), head, start % S, H, S)
            live = slot < end - start
            k = tl.load(k_cache + row * D + in_tile, mask=live[:, None], other=nothing)
            v = tl.load(v_cache + row * D + in_tile, mask=live[:, None], other=nothing)
            scores = tl.sum(k.to(tl.float32) * q[None, :], 1)
            own_scales = 1.0
            if cache_scales is not None:
                pairs = tl.load(cache_scales + row + slot, mask=live, other=0)
                scores *= key_scale(pairs)
                own_scales = value_scale(pairs)
            # Not `live`, which would stay in registers from the load, some iterations ago, until here.
            scores = tl.where(slot + start < end, scores, float("-inf"))
            maxima, totals, outputs = _add(maxima, totals, outputs, scores, 1.0, v.to(tl.float32), own_scales)
        if part != _STORE:
            maximum, total, output = _merge(maxima, totals, outputs)
            splits = tl.cdiv(length, SPLIT)
            target = out + token * D + dim
            if splits == 1:
                tl.store(target, (output / total).to(out.dtype.element_ty))
            else:
                first_row = tl.load(first_splits + sequence).to(tl.int64) * H + head * splits
                row = first_row + split
                tl.store(partial_outputs + row * D + dim, output)
                tl.store(partial_maxima + row, maximum)
                tl.store(partial_totals + row, total)
                # All of this program's threads have stored before one of them counts the arrival.
                tl.debug_barrier()
                arrived = tl.atomic_add(arrivals + token, 1, sem="acq_rel", scope="gpu")
                if arrived == splits - 1:
                    merged = _merge_splits(partial_outputs, partial_maxima, partial_totals, first_row, splits, D, TILE)
                    tl.store(target, merged.to(out.dtype.element_ty))
                    tl.store(arrivals + token, 0)
    if ahead is not None:
        idle = tl.program_id(0) - num_work
        if idle >= 0:
            prefetch_lines(ahead, AHEAD_LINES, idle * 128, (tl.num_programs(0) - num_work) * 128, COUNT=128)


def decode_attention(
    qkv: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: LayerCache,
    lengths: torch.Tensor,
    block_tables: torch.Tensor,
    workspace: DecodeWorkspace,
    *,
    out: torch.Tensor | None = None,
    config: DecodeConfig = DecodeConfig(),
    angles_by_row: bool = False,
    ahead: torch.Tensor | None = None,
    shared: bool = False,
    pdl: bool = False,
) -> torch.Tensor:
    """Attention of one new token a row over the cached tokens of its sequence and itself.

    A row is a sequence; or, with `shared`, one of several tokens in a row of a sequence, each of which attends to those
    before it.  A launch of its own then stores the keys and values of all rows first.

    q and k become rotary(LayerNorm(.)) in float32; k and v are rounded to the cache's dtype and written to their
    page, in int8 with their scales; then softmax(q k^T / sqrt(D)) v, of what was rounded.  Splits are attended to by
    themselves and combined by the program that finishes last, always in the order of the splits (Flash-Decoding: Dao et
    al., pytorch.org/blog/flash-decoding; the online softmax is Milakov and Gimelshein's, arXiv:1805.02867).  A
    sequence's bits depend on nothing but its own tokens.

    Bytes, for each head of a sequence of L tokens in n splits, with elements of e bytes in qkv and c in the cache:
    2 * D * c * (L - 1) of K and V, with int8 another 4 * (L - 1) of scales, and n * 3 * D * e of qkv are read,
    D * (e + 2 * c) written; where n > 1, another 4 * (D + 2) * n are written and read, which the L2 cache holds.  With
    `shared` qkv is read once more.  Rows of one sequence read the same K and V at about the same time, so all but the
    first of them find most of it in the L2 cache.

    Args:
        qkv: [B, H, 3, D], the fused projection as it comes: per head its query, key and value.
        norm_weight, norm_bias: [2, D], for queries and for keys; both None where the model has no QK-norm.
        eps: of the LayerNorms.
        cos, sin: [max_position, R / 2] float32, a row for each position; [B, R / 2] with `angles_by_row`.
        cache: the layer's; each sequence's row for position length - 1 is written, no other.
        lengths: [B] int32, as `decode_work.build_work_list` was given them.
        block_tables: [B, W] int32, the blocks of each sequence, its new token's included; read no further than that.
        workspace: holds the step's work list.
        out: [B, H * D], in qkv's dtype; made when None.  Rows of length zero are left as they are.
        config: how to launch it.
        angles_by_row: whether `cos` and `sin` have a row for each sequence instead of each position.
        ahead: contiguous, the weight that the next launch reads.  A few sequences occupy a part of the programs and
            leave memory idle; the other programs bring up to `AHEAD_BYTES` of it into the L2 cache.
        shared: whether rows may be of one sequence: then their block tables are equal and their lengths differ.
        pdl: launched so that it may start while its predecessor ends.

    Returns:
        out.
    """
    num_sequences, num_heads, _, head_dim = qkv.shape
    _check(qkv, cos, cache, lengths, block_tables, workspace)
    if out is None:
        out = qkv.new_empty(num_sequences, num_heads * head_dim)
    has_norm = norm_weight is not None
    most_work = num_sequences * workspace.max_splits * num_heads
    programs_per_sm = config.programs_per_sm or _PROGRAMS_PER_SM[cache.keys.dtype]
    grid = (min(num_sms(qkv.device) * programs_per_sm, most_work),)
    parts = [(_WHOLE, grid, workspace.num_items)]
    if shared:
        # Rows of one sequence are stored before any of them attends: programs of one launch do not wait for each other.
        rows = (num_sequences * num_heads,)
        parts = [(_STORE.value, rows, workspace.num_rows), (_ATTEND.value, grid, workspace.num_items)]
    for part, programs, num_items in parts:
        _decode_attention[programs](
            out,
            qkv,
            norm_weight if has_norm else qkv,
            norm_bias if has_norm else qkv,
            cos,
            sin,
            cache.keys,
            cache.values,
            scale_pairs(cache),
            lengths,
            block_tables,
            num_items,
            *workspace.tensors[1:],
            ahead,
            eps,
            math.log2(math.e) / math.sqrt(head_dim),
            block_tables.shape[1],
            part,
            H=num_heads,
            D=head_dim,
            HALF=cos.shape[1],
            S=cache.block_size,
            TILE=min(cache.block_size, _MAX_TILE),
            SPLIT=SPLIT_TOKENS,
            HAS_NORM=has_norm,
            BY_ROW=angles_by_row,
            AHEAD_LINES=0 if ahead is None else min(AHEAD_BYTES, ahead.nbytes) // LINE_BYTES,
            STAGES=config.stages,
            PDL=pdl,
            num_warps=config.warps,
            **launch_options(pdl),
        )
    return out


def _check(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    cache: LayerCache,
    lengths: torch.Tensor,
    block_tables: torch.Tensor,
    workspace: DecodeWorkspace,
) -> None:
    num_sequences, num_heads, _, head_dim = qkv.shape
    block_size = cache.block_size
    if head_dim not in (16, 32, 64, 128) or block_size not in (16, 32, 64) or not 0 < 2 * cos.shape[1] <= head_dim:
        raise ValueError(
            f"heads of {head_dim} dimensions, {2 * cos.shape[1]} of them rotary, and blocks of {block_size} tokens;"
            " the kernel takes heads of 16, 32, 64 or 128, of which some or all are rotary, and blocks of 16, 32 or 64"
        )
    check_cache(cache, num_heads, head_dim)
    if lengths.shape != (num_sequences,) or block_tables.shape[0] != num_sequences:
        raise ValueError(f"{num_sequences} sequences, {[*lengths.shape]} lengths, {block_tables.shape[0]} block tables")
    most, heads, dim = *workspace.arrivals.shape, workspace.partial_outputs.shape[1]
    if num_sequences > most or (num_heads, head_dim) != (heads, dim):
        raise ValueError(
            f"{num_sequences} sequences of {num_heads} heads of {head_dim}; the workspace is for at most {most}"
            f" sequences of {heads} heads of {dim}"
        )
    if not all(tensor.is_contiguous() for tensor in (qkv, cos, lengths, block_tables)):
        raise ValueError("qkv, cos, sin, lengths and block tables must be contiguous")
