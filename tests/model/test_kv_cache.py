"""The cache passes its layers whole: what belongs to a layer is copied and found with it."""

import torch

from persimmon.kernels import LayerCache
from persimmon.model.kv_cache import KVCache


def layer_with_scales(seed: int) -> LayerCache:
    """Keys and values of one byte each, and two scales for each token of a head."""
    generator = torch.Generator().manual_seed(seed)

    def stored() -> torch.Tensor:
        return torch.randint(-127, 128, (6, 2, 4, 8), dtype=torch.int8, generator=generator)

    return LayerCache(stored(), stored(), torch.rand(6, 2, 4, 2, generator=generator))


def test_copying_a_block_copies_its_scales_too() -> None:
    cache = KVCache([layer_with_scales(seed) for seed in range(2)])
    before = [tensor.clone() for tensor in cache.tensors]
    assert len(before) == 2 * 3
    cache.copy([(1, 4), (4, 0)])
    for tensor, old in zip(cache.tensors, before, strict=True):
        assert torch.equal(tensor, old[[4, 1, 2, 3, 1, 5]])


def test_copying_a_block_copies_numbers_of_a_type_that_torch_does_not_index() -> None:
    stored = [layer_with_scales(3).keys.view(torch.float8_e4m3fn) for _ in range(2)]
    before = stored[0].view(torch.uint8).clone()
    KVCache([LayerCache(*stored)]).copy([(1, 4), (4, 0)])
    for tensor in stored:
        assert torch.equal(tensor.view(torch.uint8), before[[4, 1, 2, 3, 1, 5]])


def test_a_layer_without_scales_is_keys_and_values() -> None:
    keys, values = torch.zeros(3, 2, 16, 8), torch.ones(3, 2, 16, 8)
    cache = KVCache([LayerCache(keys, values)])
    assert [tensor.data_ptr() for tensor in cache.tensors] == [keys.data_ptr(), values.data_ptr()]
    assert (cache.num_blocks, cache.num_heads, cache.block_size) == (3, 2, 16)
