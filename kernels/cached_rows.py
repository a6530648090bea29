"""Keys and values of a cache as Triton kernels hold them: where they lie, how 8 bits are rounded to and read from.

Knows no attention.  What is stored is what `reference_cache` stores, bit for bit: its operations are exact or correctly
rounded, on every GPU and in the interpreter.  Shapes use N for blocks, H for heads, S for tokens in a block and D for
head_dim; a "row" is one token of one head.
"""

import torch
import triton
import triton.language as tl

from persimmon.kernels.operands import LayerCache


@triton.jit
def cache_row(block, head, slot, H: tl.constexpr, S: tl.constexpr):
    """Of the cache viewed as [N * H * S, D]; in 64 bits, because a cache holds more than 2^31 numbers."""
    return (block.to(tl.int64) * H + head) * S + slot


@triton.jit
def magnitude_bits(x):
    """Float32 numbers without their sign, as integers of the same order; NaN is the largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_bits(largest):
    """The bfloat16 scale of rows of int8 in the lower half of int32, from `magnitude_bits` of their largest numbers."""
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), 127.0)
    bits = scale.to(tl.int32, bitcast=True)
    # To nearest, ties to even; of a NaN the carry could reach the sign.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(scale == scale, rounded, 0x7FC0)


@triton.jit
def key_scale(pair):
    """The float32 scale of a key, from the word that a token's two scales are."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def value_scale(pair):
    """The float32 scale of a value, from the same word."""
    return (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def scaled_to_int8(x, scale):
    """Float32 numbers over the scales of their rows, as float32 integers from -127 to 127."""
    usable = (scale > 0) & (scale < float("inf"))
    quotient = tl.div_rn(x, tl.where(usable, scale, 1.0))
    # A float32 of 2^23 and more has no fraction: adding 1.5 * 2^23 rounds to nearest, ties to even.
    nearest = tl.minimum(tl.maximum(quotient, -127.0), 127.0) + 12582912.0 - 12582912.0
    return tl.where(usable, nearest, 0.0)


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """Float32 numbers in a cache's type.  Those for int8 are integers; float8e4nv saturates at 448, NaN stays NaN."""
    if dtype == tl.float8e4nv:
        bits = x.to(tl.int32, bitcast=True)
        magnitude = magnitude_bits(x)
        finite = tl.minimum(magnitude, 0x43E00000)
        # A float32 from 2^14 on has steps of 2^-9, as the type has below 2^-6.
        subnormal = (finite.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        # Three bits of the fraction, to nearest, ties to even; the exponent's bias is 7 instead of 127.
        normal = ((finite + 0x7FFFF + ((finite >> 20) & 1)) >> 20) - (120 << 3)
        code = tl.where(magnitude > 0x7F800000, 0x7F, tl.where(finite < 0x3C800000, subnormal, normal))
        stored = (code | ((bits >> 24) & 0x80)).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        stored = x.to(dtype)
    return stored


@triton.jit
def widened(numbers, scale, dtype: tl.constexpr):
    """Rows [*, D] of a cache as numbers of dtype; scale: [*] float32, of int8, or None."""
    if scale is None:
        rows = numbers.to(dtype)
    else:
        if dtype == tl.float16:
            # A row whose largest number was float16's largest must not become infinite, and a NaN stays what it is.
            rounded_up = (scale > 65504.0 / 127) & (scale < float("inf"))
            scale = tl.where(rounded_up, 65504.0 / 127, scale)
        rows = (numbers.to(tl.float32) * scale[:, None]).to(dtype)
    return rows


def scale_pairs(cache: LayerCache) -> torch.Tensor | None:
    """[N, H, S] int32, a word for a token's two scales, its key's in the lower half; None where there are none."""
    return None if cache.scales is None else cache.scales.view(torch.int32).squeeze(-1)


def check_cache(cache: LayerCache, heads: int, dim: int, dtype: torch.dtype | None = None) -> None:
    """Makes sure that the kernels can read a layer's cache.

    Args:
        cache: the layer's.
        heads: H.
        dim: D.
        dtype: of numbers that are not of 8 bits; None for any.

    Raises:
        ValueError: its tensors do not have these shapes and types, or are not contiguous.
    """
    keys, values, scales = cache.keys, cache.values, cache.scales
    eight_bits = (torch.int8, torch.float8_e4m3fn)
    for stored in (keys, values):
        _, cache_heads, _, cache_dim = stored.shape
        known = stored.dtype in (dtype or stored.dtype, *eight_bits)
        if (cache_heads, cache_dim) != (heads, dim) or not known or not stored.is_contiguous():
            raise ValueError(
                f"K and V must be [blocks, {heads}, block size, {dim}] of {dtype or 'any type'} or 8 bits, and "
                f"contiguous, got {list(stored.shape)} {stored.dtype}"
            )
    if keys.shape != values.shape or keys.dtype != values.dtype:
        raise ValueError(f"K and V must have one shape and type, got {list(keys.shape)} and {list(values.shape)}")
    expected = [*keys.shape[:3], 2] if keys.dtype == torch.int8 else None
    given = None if scales is None else list(scales.shape)
    if given != expected:
        raise ValueError(f"scales must be {expected} for K and V of {keys.dtype}, got {given}")
    if scales is not None and (scales.dtype != torch.bfloat16 or not scales.is_contiguous()):
        raise ValueError(f"scales must be torch.bfloat16 and contiguous, got {scales.dtype}")
