"""Caches with nothing in them, and whether two of 8 bits hold the same keys and values."""

import torch

from persimmon.kernels import LayerCache
from persimmon.kernels.cache_types import allocate_layer
from persimmon.kernels.reference_cache import gather_tiles

NAN = float("nan")


def empty_layer(shape: tuple[int, int, int, int], dtype: torch.dtype) -> LayerCache:
    """Full of NaN, where its type has it, and otherwise of numbers that none rounds to."""
    layer = allocate_layer(shape, dtype, lambda shape, dtype: torch.empty(shape, dtype=dtype))
    for tensor in layer.tensors:
        tensor.fill_(-128 if tensor.dtype == torch.int8 else NAN)
    return layer


def assert_stored_alike(own: LayerCache, other: LayerCache, before: LayerCache) -> None:
    """The same rows have changed; values have the same bits, and keys lie within a step of rounding.

    Keys have passed a LayerNorm, whose last bits may decide about a number; few of them do.
    """
    for stored, theirs, old in zip(own.tensors, other.tensors, before.tensors, strict=True):
        assert torch.equal(_rows_changed(stored, old), _rows_changed(theirs, old))
    assert torch.equal(own.values.view(torch.uint8), other.values.view(torch.uint8))
    (keys, values), (expected_keys, expected_values) = _numbers_of(own), _numbers_of(other)
    torch.testing.assert_close(values, expected_values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(keys.isnan(), expected_keys.isnan())
    keys, expected_keys = keys.nan_to_num(), expected_keys.nan_to_num()
    steps = {torch.int8: keys.abs().amax(-1, keepdim=True) / 127, torch.float8_e4m3fn: keys.abs() / 8 + 2**-9}
    step, difference = steps[own.keys.dtype], (keys - expected_keys).abs()
    assert (difference <= 1.01 * step).all()
    assert (difference > 0.3 * step).float().mean() < 0.01


def _rows_changed(tensor: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """[N, H, S] bool, where a row has other bits."""
    return (tensor.view(torch.uint8) != before.view(torch.uint8)).any(-1)


def _numbers_of(cache: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values in float32, [N * H, S, D]."""
    tiles = torch.arange(cache.keys.shape[0] * cache.keys.shape[1])
    return gather_tiles(cache, tiles, len(tiles))
