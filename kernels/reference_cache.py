"""Keys and values as a KV cache holds them, in plain torch: rows rounded to 8 bits, stored, and read back.

Knows no attention.  Shapes use H for heads, D for head_dim, N for blocks and S for the tokens in a block.
"""

import torch

from persimmon.kernels.cache_types import SCALE_DTYPE
from persimmon.kernels.operands import LayerCache

LARGEST_INT8 = 127
"""Numbers are symmetric: -128 is not used."""


def quantize_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in 8 bits: a scale each, and numbers of which the largest is at 127.

    The scale is the row's largest magnitude / 127, rounded to bfloat16; the numbers are the row divided by that,
    rounded to nearest, ties to even.  The numbers are zero where the scale is zero, and where it is not finite, so that
    number * scale makes a row NaN that holds an infinity or NaN, and no other row.

    Args:
        rows: [*, D].

    Returns:
        [*, D] int8, and [*] bfloat16.
    """
    rows = rows.float()
    scales = (rows.abs().amax(-1) / LARGEST_INT8).to(SCALE_DTYPE)
    usable = scales.isfinite() & (scales > 0)
    numbers = rows / torch.where(usable, scales.float(), 1.0)[..., None]
    numbers = numbers.round().clamp(-LARGEST_INT8, LARGEST_INT8)
    return torch.where(usable[..., None], numbers, 0.0).to(torch.int8), scales


def dequantize_rows(numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[*, D] float32: numbers [*, D] times the scales [*] of their rows."""
    return numbers.float() * scales.float()[..., None]


def saturate_to_fp8(rows: torch.Tensor) -> torch.Tensor:
    """Rows in float8_e4m3fn, rounded to nearest even; magnitudes above 448 become 448, NaN stays NaN."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    return rows.float().clamp(-largest, largest).to(torch.float8_e4m3fn)


def store_rows(cache: LayerCache, places: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Writes rows in the cache's type.

    Args:
        cache: the layer's.
        places: [R] int64, rows of the cache viewed as [N * H * S, D].
        keys, values: [R, D].
    """
    dim = keys.shape[-1]
    for which, (stored, rows) in enumerate(((cache.keys, keys), (cache.values, values))):
        if cache.scales is not None:
            numbers, own = quantize_rows(rows)
            cache.scales.view(-1, 2)[:, which].index_copy_(0, places, own)
            stored.view(-1, dim).index_copy_(0, places, numbers)
        elif stored.dtype == torch.float8_e4m3fn:
            # Copied as bytes: torch copies few things of such a type.
            bits = saturate_to_fp8(rows).view(torch.uint8)
            stored.view(torch.uint8).view(-1, dim).index_copy_(0, places, bits)
        else:
            stored.view(-1, dim).index_copy_(0, places, rows)


def gather_tiles(cache: LayerCache, tiles: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A sequence's keys and values, copied out of its blocks; those of 8 bits widened to float32.

    Args:
        cache: the layer's.
        tiles: [H * M] int64, where M blocks of each head lie in the cache viewed as [N * H, S * D].
        heads: H.

    Returns:
        Keys and values, each [H, M * S, D].
    """
    size = cache.block_size
    dim = cache.keys.shape[-1]

    def gather(stored: torch.Tensor) -> torch.Tensor:
        if stored.dtype == torch.float8_e4m3fn:
            bits = stored.view(torch.uint8).view(-1, size * dim).index_select(0, tiles)
            return bits.view(torch.float8_e4m3fn).float().view(heads, -1, dim)
        return stored.view(-1, size * dim).index_select(0, tiles).view(heads, -1, dim)

    keys, values = gather(cache.keys), gather(cache.values)
    if cache.scales is None:
        return keys, values
    key_scales, value_scales = cache.scales.view(-1, size * 2).index_select(0, tiles).view(heads, -1, 2).unbind(-1)
    return dequantize_rows(keys, key_scales), dequantize_rows(values, value_scales)
