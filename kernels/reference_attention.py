"""Attention over the paged cache in plain torch: which rows belong to whom, QK-norm, rotary embedding, softmax.

Shapes use T for the tokens of a step, H for heads, D for head_dim, R for rotary dimensions, N for blocks in the cache
and S for tokens in a block.

The KV cache of a layer is two tensors, K and V, each [N, H, S, D]: a head's tokens of a block lie side by side; how 8
bits are stored is `reference_cache`'s.  A "row" is one token of one head, D numbers; row (n * H + h) * S + s of a cache
viewed as [N * H * S, D].
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from persimmon.kernels.operands import LayerCache, Rotary
from persimmon.kernels.reference_cache import gather_tiles, store_rows

PADDING_LIMIT = 1.25
"""Decoding sequences share one attention call while padding them to the longest costs at most this factor."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Neighbouring decoding sequences of similar length.

    Attributes:
        first, end: their tokens in the step.
        scores: [G * H, N * H * S] sparse CSR; row g * H + h has one entry for each cached token of sequence g, in
            the column that is the token's row for head h.  Every row has L entries: where a sequence is shorter
            the rest points at its own first token, and `padding` masks it.
        offsets: [G * H] int64, where each row's entries begin.
        padding: [G, 1, L] bool, true where an entry is padding; None when there is none.
    """

    first: int
    end: int
    scores: torch.Tensor
    offsets: torch.Tensor
    padding: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """One sequence's tokens against its cached context.

    Attributes:
        first, end: its tokens in the step.
        start: position of the first of them.
        tiles: [H * M] int64, the cache viewed as [N * H, S * D] holds its M blocks, head by head, at these places.
    """

    first: int
    end: int
    start: int
    tiles: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Where a step's tokens go and what they attend to; made once a step, used by every layer.

    Attributes:
        positions: [T] int64, each token's place in its sequence.
        store_rows: [T * H] int64, the cache rows that the tokens' keys and values are written to.
        decodes: sequences with one token each, read in place through sparse products.
        chunks: all others, gathered.
    """

    positions: torch.Tensor
    store_rows: torch.Tensor
    decodes: list[DecodeGroup]
    chunks: list[ChunkPlan]


def plan_attention(
    block_tables: Sequence[Sequence[int]],
    starts: Sequence[int],
    counts: Sequence[int],
    *,
    num_blocks: int,
    num_heads: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> AttentionPlan:
    """Turns a step's sequences into index tensors.

    Args:
        block_tables: for each sequence, the blocks that hold its tokens, those of this step included.
        starts: position of each sequence's first token in this step.
        counts: how many tokens each has in this step.
        num_blocks: N of the cache.
        num_heads: H of the cache.
        block_size: S of the cache.
        dtype: of the cache.
        device: of the cache.

    The sequences' tokens lie one after the other in the step, in the order given: those with a single token first,
    best sorted by length, because neighbours of similar length share a call.
    """
    heads = np.arange(num_heads, dtype=np.int64)
    positions = np.concatenate([np.arange(s, s + c, dtype=np.int64) for s, c in zip(starts, counts, strict=True)])
    blocks = np.concatenate(
        [
            np.asarray(table, dtype=np.int64)[np.arange(s, s + c) // block_size]
            for table, s, c in zip(block_tables, starts, counts, strict=True)
        ]
    )
    store_rows = (blocks[:, None] * num_heads + heads) * block_size + (positions % block_size)[:, None]

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(device, non_blocking=True)

    # The sparse products exist only for float32 on a CPU; elsewhere single tokens are chunks of one.
    in_place = device.type == "cpu" and dtype == torch.float32
    num_decodes = next((i for i, count in enumerate(counts) if count != 1), len(counts)) if in_place else 0
    lengths = [start + 1 for start in starts[:num_decodes]]
    decodes = list(_decode_groups(block_tables[:num_decodes], lengths, num_blocks, num_heads, block_size))
    chunks: list[ChunkPlan] = []
    first = num_decodes
    for table, start, count in zip(block_tables[num_decodes:], starts[num_decodes:], counts[num_decodes:], strict=True):
        used = np.asarray(table[: -(-(start + count) // block_size)], dtype=np.int64)
        tiles = (used[None, :] * num_heads + heads[:, None]).reshape(-1)
        chunks.append(ChunkPlan(first=first, end=first + count, start=start, tiles=tensor(tiles)))
        first += count
    return AttentionPlan(
        positions=tensor(positions), store_rows=tensor(store_rows.reshape(-1)), decodes=decodes, chunks=chunks
    )


def _decode_groups(
    tables: Sequence[Sequence[int]],
    lengths: Sequence[int],
    num_blocks: int,
    num_heads: int,
    block_size: int,
) -> Iterator[DecodeGroup]:
    begin = 0
    while begin < len(lengths):
        end = begin
        longest = total = 0
        while end < len(lengths):
            longest_with = max(longest, lengths[end])
            total_with = total + lengths[end]
            if longest_with * (end - begin + 1) > PADDING_LIMIT * total_with:
                break
            longest, total = longest_with, total_with
            end += 1
        yield _decode_group(tables[begin:end], lengths[begin:end], longest, begin, num_blocks, num_heads, block_size)
        begin = end


def _decode_group(
    tables: Sequence[Sequence[int]],
    lengths: Sequence[int],
    longest: int,
    first: int,
    num_blocks: int,
    num_heads: int,
    block_size: int,
) -> DecodeGroup:
    size = len(tables)
    width = -(-longest // block_size)
    table = np.zeros((size, width), dtype=np.int64)
    for row, blocks in enumerate(tables):
        used = min(len(blocks), width)
        table[row, :used] = blocks[:used]
    heads = np.arange(num_heads, dtype=np.int64)
    tiles = (table[:, None, :] * num_heads + heads[:, None]) * block_size
    columns = (tiles[..., None] + np.arange(block_size)).reshape(size, num_heads, width * block_size)[..., :longest]
    padding = None
    if min(lengths) < longest:
        beyond = np.arange(longest) >= np.asarray(lengths)[:, None]
        columns = np.where(beyond[:, None, :], columns[..., :1], columns)
        padding = torch.from_numpy(beyond[:, None, :])
    rows = size * num_heads
    bounds = torch.arange(0, rows * longest + 1, longest, dtype=torch.int64)
    indices = torch.from_numpy(np.ascontiguousarray(columns).reshape(-1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)", category=UserWarning)
        scores = torch.sparse_csr_tensor(
            bounds,
            indices,
            torch.zeros(1).expand(rows * longest),
            size=(rows, num_blocks * num_heads * block_size),
            check_invariants=False,
        )
    return DecodeGroup(first=first, end=first + size, scores=scores, offsets=bounds[:-1], padding=padding)


def rotary_at(table: Rotary, plan: AttentionPlan) -> Rotary:
    """What `attention` takes as rotary in this step: here the angles of each of its tokens, [T, R/2]."""
    return Rotary(table.cos[plan.positions], table.sin[plan.positions])


def qk_norm_rotary_store(
    qkv: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: LayerCache,
    plan: AttentionPlan,
) -> torch.Tensor:
    """LayerNorm of queries and keys, rotary embedding of their first dimensions, keys and values into the cache.

    Rotary turns dimension i against i + R/2 for i < R/2 by position * theta^(-2i/R); the D - R others pass
    (Su et al., RoFormer, arXiv:2104.09864, in the rotate-half arrangement of GPT-NeoX).

    Args:
        qkv: [T, H, 3, D], the fused projection as it comes: per head its query, key and value.
        norm_weight, norm_bias: [2, D], for queries and for keys, shared by all heads; both None where the model has
            no QK-norm.
        eps: of the LayerNorms.
        cos, sin: [T, 1, 1, R/2] float32, of each token's angle.
        cache: the layer's, written at `plan.store_rows`.
        plan: the step's.

    Returns:
        [T, H, D], the queries.
    """
    tokens, heads, _, dim = qkv.shape
    qk = qkv[:, :, :2].float()
    if norm_weight is not None and norm_bias is not None:
        qk = torch.addcmul(norm_bias.float(), F.layer_norm(qk, (dim,), eps=eps), norm_weight.float())
    elif qk.data_ptr() == qkv.data_ptr():
        qk = qk.clone()
    half = cos.shape[-1]
    left, right = qk[..., :half], qk[..., half : 2 * half]
    turned_left = left * cos - right * sin
    turned_right = right * cos + left * sin
    left.copy_(turned_left)
    right.copy_(turned_right)
    qk = qk.to(qkv.dtype)
    keys, values = (rows.reshape(tokens * heads, dim) for rows in (qk[:, :, 1], qkv[:, :, 2]))
    store_rows(cache, plan.store_rows, keys, values)
    return qk[:, :, 0]


def paged_attention(q: torch.Tensor, cache: LayerCache, plan: AttentionPlan) -> torch.Tensor:
    """Causal softmax(q k^T / sqrt(D)) v over each sequence's own blocks.

    Reads no row that its sequence has not written, so what other sequences left behind, NaN included, is harmless.

    Args:
        q: [T, H, D].
        cache: the layer's, this step's keys and values stored already.
        plan: the step's.

    Returns:
        [T, H * D] in q's dtype.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for group in plan.decodes:
        out[group.first : group.end] = _attend_in_place(q[group.first : group.end], cache, group)
    for chunk in plan.chunks:
        out[chunk.first : chunk.end] = _attend_gathered(q[chunk.first : chunk.end], cache, chunk)
    return out.view(out.shape[0], -1)


def _attend_in_place(q: torch.Tensor, cache: LayerCache, group: DecodeGroup) -> torch.Tensor:
    """One query a sequence, with the block table as a sparse matrix: no key or value is copied.

    Scores are the entries of Q K^T at the sparse pattern; the output is a weighted sum of V's rows, which is an
    embedding bag.  Reads 2 * D * 4 bytes a cached token and head, once.
    """
    size, heads, dim = q.shape
    scores = torch.sparse.sampled_addmm(
        group.scores, q.reshape(-1, dim), cache.keys.view(-1, dim).t(), beta=0.0, alpha=1 / math.sqrt(dim)
    ).values()
    if group.padding is not None:
        scores.view(size, heads, -1).masked_fill_(group.padding, float("-inf"))
    weights = scores.view(size * heads, -1).softmax(-1).view(-1)
    attended = F.embedding_bag(
        group.scores.col_indices(),
        cache.values.view(-1, dim),
        group.offsets,
        mode="sum",
        per_sample_weights=weights,
    )
    return attended.view(size, heads, dim)


def _attend_gathered(q: torch.Tensor, cache: LayerCache, chunk: ChunkPlan) -> torch.Tensor:
    """A chunk of queries against one sequence's context, copied out of its blocks."""
    count, heads, _ = q.shape
    length = chunk.start + count
    k, v = (rows[:, :length] for rows in gather_tiles(cache, chunk.tiles, heads))
    dtype, q = q.dtype, q.to(k.dtype)
    if chunk.start == 0:
        attended = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None], is_causal=count > 1)
    else:
        mask = torch.ones(count, length, dtype=torch.bool, device=q.device).tril(chunk.start)
        attended = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask)
    return attended[0].transpose(0, 1).to(dtype)
