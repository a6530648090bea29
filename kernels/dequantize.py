"""Packed weights back to 16 bits, for large steps, which cuBLAS multiplies best.

Multiplies nothing.
"""

import torch
import triton
import triton.language as tl

from persimmon.kernels.launch import Limits
from persimmon.kernels.layer_norm import exact_launch_options
from persimmon.kernels.packed_product import load_words
from persimmon.kernels.packed_weight import FEATURES, PackedWeight
from persimmon.kernels.unpack import columns_tile, group_scale, high_halves, low_halves, rows_tile, whole_bytes

LIMITS = {
    "dequantize_kernel": Limits(registers=128, shared_bytes=40_000),
}
"""Most that the machine code may take."""


@triton.jit
def store_numbers(out, numbers, scale, outputs, features, num_outputs, IN_FEATURES: tl.constexpr):
    """Stores numbers [outputs, features] float32 times scale [outputs], rounded."""
    scaled = numbers * tl.broadcast_to(scale[:, None], numbers.shape)
    places = out + outputs.to(tl.int64)[:, None] * IN_FEATURES + features[None, :]
    mask = (outputs < num_outputs)[:, None] & (features < IN_FEATURES)[None, :]
    tl.store(places, scaled.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_tile", "num_outputs"])
def dequantize_kernel(
    out,
    weight,
    scales,
    first_tile,
    num_outputs,
    IN_FEATURES: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    RUN: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    FEATURES: tl.constexpr = FEATURES,
):
    """64 outputs (128 in columns of 4 bits) of FEATURES inputs; see `dequantize`."""
    UNITS: tl.constexpr = FEATURES // UNIT
    UNIT_BYTES: tl.constexpr = TILE_OUTPUTS * UNIT * BITS // 8
    HALVES: tl.constexpr = 2 if BITS == 4 else 1
    WIDTH: tl.constexpr = UNIT if COLUMNS else UNIT // HALVES
    ITERATIONS: tl.constexpr = (IN_FEATURES + FEATURES - 1) // FEATURES
    tile, iteration = tl.program_id(0), tl.program_id(1)
    # Outputs are counted from the first tile on.
    base = weight + ((first_tile + tile).to(tl.int64) * ITERATIONS + iteration) * (UNITS * UNIT_BYTES)
    if GROUP:
        PER_WORD: tl.constexpr = 1 if SCALES == "float32" else 2
        WIDE: tl.constexpr = TILE_OUTPUTS // 64
        # Blocks of 64 outputs, whose scales lie apart.
        low_words = load_words(scales, iteration * WORDS, (first_tile + tile) * WIDE, WORDS, ITERATIONS * WORDS, 64)
        high_words = load_words(
            scales, iteration * WORDS, (first_tile + tile) * WIDE + WIDE - 1, WORDS, ITERATIONS * WORDS, 64
        )
    for unit in tl.static_range(UNITS):
        if COLUMNS:
            packed = tl.load(base + unit * UNIT_BYTES + tl.arange(0, UNIT)[:, None] * 64 + tl.arange(0, 64)[None, :])
            packed = columns_tile(packed, RUN, UNIT)
        else:
            packed = tl.load(
                base + unit * UNIT_BYTES + tl.arange(0, 64)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
            )
            packed = rows_tile(packed, RUN, 64, WIDTH)
        for half in tl.static_range(HALVES):
            if BITS == 8:
                numbers = whole_bytes(packed, tl.float32)
            elif half == 0:
                numbers = low_halves(packed, tl.float32)
            else:
                numbers = high_halves(packed, tl.float32)
            # The high half bytes are further outputs in columns, and further inputs in rows.
            outputs = tile * TILE_OUTPUTS + (half * 64 if COLUMNS else 0) + tl.arange(0, 64)
            features = iteration * FEATURES + unit * UNIT + (0 if COLUMNS else half * WIDTH) + tl.arange(0, WIDTH)
            if GROUP:
                words = high_words if COLUMNS and half == 1 else low_words
                scale = group_scale(
                    words[(unit * UNIT + (0 if COLUMNS else half * WIDTH)) // GROUP // PER_WORD],
                    (unit * UNIT + (0 if COLUMNS else half * WIDTH)) // GROUP % PER_WORD == 1,
                    SCALES,
                )
            else:
                scale = tl.load(scales + first_tile * TILE_OUTPUTS + outputs)
            store_numbers(out, numbers, scale, outputs, features, num_outputs, IN_FEATURES)


def dequantize(weight: PackedWeight, buffer: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    """Some outputs of a packed weight, number times scale in float32 and rounded once.

    Reads the bytes of these outputs and writes 2 * (stop - first) * in bytes in 16 bits.

    Args:
        weight: packed.
        buffer: [at least (stop - first) * in], of the dtype to round to.
        first, stop: outputs; first is a multiple of 128.

    Returns:
        [stop - first, in], a view of the buffer.
    """
    packing, in_features = weight.packing, weight.shape[1]
    out = buffer[: (stop - first) * in_features].view(stop - first, in_features)
    dequantize_kernel[(triton.cdiv(stop - first, packing.outputs), triton.cdiv(in_features, FEATURES))](
        out,
        weight.numbers,
        weight.scales,
        first // packing.outputs,
        stop - first,
        IN_FEATURES=in_features,
        **packing.constants,
        num_warps=4,
        **exact_launch_options(False),
    )
    return out
