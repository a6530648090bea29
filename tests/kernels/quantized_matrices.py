"""Random quantized matrices, and shapes of packed ones without numbers."""

import torch

from persimmon.kernels.packed_weight import FEATURES, PackedWeight, Packing
from persimmon.kernels.quantized import Bits, QuantizedFormat, QuantizedMatrix, pack_int4


def random_matrix(
    shape: tuple[int, int],
    bits: Bits,
    group_size: int | None,
    *,
    scale_dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> QuantizedMatrix:
    """Of all numbers that the bits hold; its products with normal inputs have a deviation of about one half."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    most = 1 << (bits - 1)
    integers = torch.randint(-most, most, shape, generator=generator).to(torch.int8)
    spread = 0.5 + torch.rand(rows, columns // (group_size or columns), generator=generator)
    scales = (spread / (most * columns**0.5)).to(scale_dtype)
    return QuantizedMatrix(integers if bits == 8 else pack_int4(integers), scales, bits, group_size or columns)


def packed_shape(
    shape: tuple[int, int], stored: QuantizedFormat, *, columns: bool = False, generation: int = 9
) -> PackedWeight:
    """What `pack` makes of a matrix of this shape, on the meta device."""
    packing = Packing.of(stored, columns=columns, generation=generation)
    rows, inputs = packing.padded(shape)
    numbers = torch.empty(
        rows // packing.outputs, inputs // packing.unit, packing.tile_bytes, dtype=torch.uint8, device="meta"
    )
    words = (rows,) if packing.group is None else (rows // 64, inputs // FEATURES * packing.words, 64)
    dtype = torch.int32 if packing.scale_kind in ("float16", "bfloat16") else torch.float32
    return PackedWeight(numbers, torch.empty(words, dtype=dtype, device="meta"), shape, packing)
