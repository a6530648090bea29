"""Decode attention as the 8B model calls it, on meta tensors, and what its machine code must hold."""

from collections.abc import Callable
from functools import partial

import torch

from persimmon.kernels.cache_types import allocate_layer
from persimmon.kernels.decode_attention import decode_attention
from persimmon.kernels.decode_work import DecodeWorkspace
from persimmon.kernels.operands import LayerCache

META = torch.device("meta")
SEQUENCES, HEADS, DIM, MAX_LENGTH = 64, 64, 64, 16384


def workspace() -> DecodeWorkspace:
    return DecodeWorkspace.allocate(256, MAX_LENGTH, HEADS, DIM, META)


def layer_cache(block_size: int, dtype: torch.dtype) -> LayerCache:
    shape = (4096, HEADS, block_size, DIM)
    return allocate_layer(shape, dtype, lambda shape, dtype: torch.empty(shape, dtype=dtype, device=META))


def decode(
    block_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
    *,
    normed: bool = True,
    shared: bool = False,
    pdl: bool = False,
) -> None:
    norm = torch.empty(2, DIM, dtype=torch.float32, device=META) if normed else None
    table = torch.empty(MAX_LENGTH, DIM // 4, device=META)
    width = HEADS * DIM
    decode_attention(
        torch.empty(SEQUENCES, HEADS, 3, DIM, dtype=dtype, device=META),
        norm,
        norm,
        1e-5,
        table,
        table,
        layer_cache(block_size, cache_dtype or dtype),
        torch.empty(SEQUENCES, dtype=torch.int32, device=META),
        torch.empty(SEQUENCES, MAX_LENGTH // block_size, dtype=torch.int32, device=META),
        workspace(),
        ahead=torch.empty(width, width, dtype=dtype, device=META),
        shared=shared,
        pdl=pdl,
    )


CALLS: dict[str, Callable[[], None]] = {
    "decode, blocks of 16": partial(decode, 16, torch.float16),
    "decode, blocks of 32": partial(decode, 32, torch.float16),
    "decode, blocks of 64": partial(decode, 64, torch.float16),
    "decode, bfloat16": partial(decode, 32, torch.bfloat16),
    "decode, float32": partial(decode, 32, torch.float32),
    "decode, int8": partial(decode, 32, torch.float16, torch.int8),
    "decode, int8, blocks of 16": partial(decode, 16, torch.float16, torch.int8),
    "decode, int8, blocks of 64": partial(decode, 64, torch.float16, torch.int8),
    "decode, int8, bfloat16": partial(decode, 32, torch.bfloat16, torch.int8),
    "decode, fp8": partial(decode, 32, torch.float16, torch.float8_e4m3fn),
    "decode, fp8, bfloat16": partial(decode, 32, torch.bfloat16, torch.float8_e4m3fn),
    "decode, guesses": partial(decode, 32, torch.float16, shared=True),
    "decode, dependent": partial(decode, 32, torch.float16, pdl=True),
}
# Pages arrive in 16-byte asynchronous copies, or 8-byte ones where a block's tile is 1 KiB, and scales in 4-byte ones;
# partial results are read where other multiprocessors put them.
EXPECTED: dict[str, tuple[str, ...]] = {
    name: (
        r"LDGSTS\.E\.64" if "int8, blocks of 16" in name else r"LDGSTS\.E\.BYPASS\.128",
        r"ATOMG\.E\.ADD\.STRONG\.GPU",
        r"LDG\.E\.128\.STRONG\.GPU",
    )
    for name in CALLS
}
EVERY_GENERATION = {"decode, blocks of 32", "decode, int8"}
EXHAUSTIVE_ONLY = (
    set(CALLS) - EVERY_GENERATION - {"decode, blocks of 16", "decode, guesses", "decode, dependent", "decode, fp8"}
)
