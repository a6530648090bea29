"""The batch-invariant attention as the 8B model calls it, on meta tensors, and what its machine code must hold."""

from collections.abc import Callable
from functools import partial

import torch

from persimmon.kernels.invariant_attention import chunk_attention, config_of, decode_attention
from persimmon.kernels.prefill_attention import plan_chunks
from tests.kernels.production_calls_decode_attention import (
    DIM,
    HEADS,
    MAX_LENGTH,
    META,
    SEQUENCES,
    layer_cache,
    workspace,
)


def _queries(tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(tokens, HEADS, DIM, dtype=dtype, device=META)


def chunks(block_size: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    counts = [2048, 77, 1]
    q, cache = _queries(sum(counts), dtype), layer_cache(block_size, cache_dtype)
    tables = [range(-(-(1000 + count) // block_size)) for count in counts]
    plan = plan_chunks(
        tables, [1000] * 3, counts, block_size=block_size, device=META, dtype=dtype, configs=[config_of(dtype)]
    )
    chunk_attention(q, cache, plan, out=torch.empty(len(q), HEADS * DIM, dtype=dtype, device=META))


def decodes(block_size: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    q, cache = _queries(SEQUENCES, dtype), layer_cache(block_size, cache_dtype)
    decode_attention(
        q,
        cache,
        torch.empty(SEQUENCES, dtype=torch.int32, device=META),
        torch.empty(SEQUENCES, MAX_LENGTH // block_size, dtype=torch.int32, device=META),
        workspace(),
        out=torch.empty(SEQUENCES, HEADS * DIM, dtype=dtype, device=META),
    )


CALLS: dict[str, Callable[[], None]] = {
    f"{name}, {kind}": partial(call, block_size, dtype, cache_dtype)
    for name, call in (("chunks", chunks), ("decodes", decodes))
    for kind, block_size, dtype, cache_dtype in (
        ("blocks of 16", 16, torch.float16, torch.float16),
        ("blocks of 32", 32, torch.float16, torch.float16),
        ("blocks of 64", 64, torch.float16, torch.float16),
        ("bfloat16", 32, torch.bfloat16, torch.bfloat16),
        ("float32", 32, torch.float32, torch.float32),
        ("int8", 32, torch.float16, torch.int8),
        ("fp8", 32, torch.float16, torch.float8_e4m3fn),
    )
}
EXHAUSTIVE_ONLY = {name for name in CALLS if "blocks of 32" not in name}
EVERY_GENERATION: set[str] = set()

_MERGES = (r"ATOMG\.E\.ADD\.STRONG\.GPU", r"LDG\.E\.\d*\.?STRONG\.GPU")
# One and the same instruction multiplies for both, which is what makes their bits equal.
EXPECTED: dict[str, tuple[str, ...]] = {
    name: (
        *(() if "float32" in name else (r"LDGSTS\.E\.BYPASS\.128", r"HGMMA\.64x64x16\.F32")),
        *(_MERGES if "decodes" in name else ()),
    )
    for name in CALLS
}
