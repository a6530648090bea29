"""Decode attention in plain torch: what the Triton kernel is tested against.

Knows one new token a sequence and the paged cache of one layer; shapes are those of
`persimmon.kernels.decode_attention`.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812

from persimmon.kernels.operands import LayerCache
from persimmon.kernels.reference_cache import gather_tiles, store_rows


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
    *,
    inside: torch.dtype = torch.float32,
) -> torch.Tensor:
    """QK-norm, rotary, cache write and attention of one new token a sequence, as in `kernels.decode_attention`.

    Args:
        qkv: [B, H, 3, D], per head its query, key and value.
        norm_weight, norm_bias: [2, D], for queries and for keys; both None where the model has no QK-norm.
        eps: of the LayerNorms.
        cos, sin: [max_position, R / 2] float32.
        cache: the layer's, of any type; each sequence's row for position length - 1 is written, no other.
        lengths: [B] int32, tokens of each sequence including the new one; zero where the row is padding.
        block_tables: [B, W] int32, the blocks of each sequence, its new token's included.
        inside: the type that everything is computed in.

    Returns:
        [B, H * D] in qkv's dtype, zeros in padding rows.
    """
    num_sequences, num_heads, _, head_dim = qkv.shape
    block_size = cache.block_size
    out = qkv.new_zeros(num_sequences, num_heads, head_dim)
    for sequence, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        position = length - 1
        blocks = block_tables[sequence, : position // block_size + 1].long()
        qk = qkv[sequence, :, :2].to(inside)
        if norm_weight is not None and norm_bias is not None:
            qk = F.layer_norm(qk, (head_dim,), eps=eps) * norm_weight.to(inside) + norm_bias.to(inside)
        q, k = _rotary(qk, cos[position].to(inside), sin[position].to(inside)).unbind(1)
        own = k, qkv[sequence, :, 2]
        if cache.keys.dtype.itemsize > 1:
            own = own[0].to(cache.keys.dtype), own[1].to(cache.values.dtype)
        tiles = blocks * num_heads + torch.arange(num_heads, device=blocks.device)[:, None]
        store_rows(cache, tiles[:, -1] * block_size + position % block_size, *own)
        keys, values = (rows[:, :length].to(inside) for rows in gather_tiles(cache, tiles.reshape(-1), num_heads))
        weights = (torch.einsum("hd,hld->hl", q, keys) / math.sqrt(head_dim)).softmax(-1)
        out[sequence] = torch.einsum("hl,hld->hd", weights, values).to(out.dtype)
    return out.view(num_sequences, -1)


def _rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Dimension i of [..., D] turned against i + R / 2, for i < R / 2; the D - R behind them pass."""
    half = cos.shape[-1]
    left, right, rest = x.tensor_split((half, 2 * half), dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin, rest), dim=-1)
