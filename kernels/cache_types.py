"""In which numbers a KV cache holds keys and values, what they take, and how a layer's tensors are made.

A type is a dtype: the network's own, or one with fewer bits.  Knows no operation and no layout within a block.
"""

from collections.abc import Callable, Mapping

import torch

from persimmon.kernels.operands import LayerCache

EIGHT_BIT_CACHES: Mapping[str, torch.dtype] = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
"""The types of 8 bits, by the names of --kv-cache-dtype.

int8: a token's numbers of a head have one scale.  fp8_e4m3: numbers have none, and saturate at 448.
"""

SCALE_DTYPE = torch.bfloat16
"""Of the scales of int8 numbers."""

_CHOICES: Mapping[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16, **EIGHT_BIT_CACHES}


def chosen_dtype(choice: str, dtype: torch.dtype) -> torch.dtype:
    """The type that a value of --kv-cache-dtype chooses, where the network computes in `dtype`."""
    return _CHOICES.get(choice, dtype)


def cache_choice(cache_dtype: torch.dtype, dtype: torch.dtype) -> str:
    """The value of --kv-cache-dtype that chooses a type, where the network computes in `dtype`: auto for that."""
    return next((name for name, own in _CHOICES.items() if own == cache_dtype != dtype), "auto")


def row_bytes(dtype: torch.dtype, head_dim: int) -> int:
    """Bytes of the keys, or of the values, of one token of one head, scale included."""
    return head_dim * dtype.itemsize + (SCALE_DTYPE.itemsize if dtype == torch.int8 else 0)


def allocate_layer(
    shape: tuple[int, int, int, int], dtype: torch.dtype, empty: Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
) -> LayerCache:
    """The tensors of one layer, with nothing in them.

    Args:
        shape: N, H, S, D as `LayerCache` has them.
        dtype: of keys and values.
        empty: makes a tensor of a shape and dtype.
    """
    keys, values = empty(shape, dtype), empty(shape, dtype)
    scales = empty((*shape[:3], 2), SCALE_DTYPE) if dtype == torch.int8 else None
    return LayerCache(keys, values, scales)
