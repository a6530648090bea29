"""Decode attention as the 8B model calls it, on meta tensors, and what its machine code must hold."""

from collections.abc import Callable
from functools import partial

import torch

from persimmon.kernels.decode_attention import DecodeWorkspace, build_work_list, decode_attention
from persimmon.kernels.operands import LayerCache

META = torch.device("meta")
SEQUENCES, HEADS, DIM, MAX_LENGTH = 64, 64, 64, 16384


def workspace() -> DecodeWorkspace:
    return DecodeWorkspace.allocate(256, MAX_LENGTH, HEADS, DIM, META)


def work_list(pdl: bool = False) -> None:
    build_work_list(torch.empty(SEQUENCES, dtype=torch.int32, device=META), workspace(), pdl=pdl)


def decode(block_size: int, dtype: torch.dtype, normed: bool = True, pdl: bool = False) -> None:
    pages = torch.empty(4096, HEADS, block_size, DIM, dtype=dtype, device=META)
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
        LayerCache(pages, pages),
        torch.empty(SEQUENCES, dtype=torch.int32, device=META),
        torch.empty(SEQUENCES, MAX_LENGTH // block_size, dtype=torch.int32, device=META),
        workspace(),
        ahead=torch.empty(width, width, dtype=dtype, device=META),
        pdl=pdl,
    )


CALLS: dict[str, Callable[[], None]] = {
    "work list": work_list,
    "decode, blocks of 16": partial(decode, 16, torch.float16),
    "decode, blocks of 32": partial(decode, 32, torch.float16),
    "decode, blocks of 64": partial(decode, 64, torch.float16),
    "decode, bfloat16": partial(decode, 32, torch.bfloat16),
    "decode, float32": partial(decode, 32, torch.float32),
    "work list, dependent": partial(work_list, pdl=True),
    "decode, dependent": partial(decode, 32, torch.float16, pdl=True),
}
# Pages arrive in 16-byte asynchronous copies; partial results are read where other multiprocessors put them.
EXPECTED: dict[str, tuple[str, ...]] = {
    name: (r"LDGSTS\.E\.BYPASS\.128", r"ATOMG\.E\.ADD\.STRONG\.GPU", r"LDG\.E\.128\.STRONG\.GPU")
    for name in CALLS
    if "decode" in name
}
COMPAT_ONLY = {"work list, dependent", "decode, blocks of 64", "decode, bfloat16", "decode, float32"}
EVERY_GENERATION = {"decode, blocks of 32"}
