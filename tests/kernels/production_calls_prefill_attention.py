"""The prompt kernels as the 8B model calls them: 64 heads of 64 dimensions, 32 of them rotary, 16,384 positions."""

from collections.abc import Callable

import torch

from persimmon.kernels.prefill_attention import LastTokens, plan_chunks, prefill_attention, qk_norm_rotary_store
from tests.kernels.production_calls_decode_attention import HEADS, META, layer_cache

HEAD_DIM, ROTARY_DIM, MAX_POSITION = 64, 32, 16384


def _call(
    counts: list[int],
    *,
    block_size: int = 32,
    dtype: torch.dtype = torch.float16,
    cache_dtype: torch.dtype | None = None,
    norm: bool = True,
    pdl: bool = False,
) -> Callable[[], None]:
    """A step of chunks of these lengths, each after a context of 1,000 tokens."""
    stored = cache_dtype or dtype

    def call() -> None:
        start = 1000
        tables = [range(-(-(start + count) // block_size)) for count in counts]
        plan = plan_chunks(tables, [start] * len(counts), counts, block_size=block_size, device=META, dtype=stored)
        qkv = torch.empty(sum(counts), HEADS, 3, HEAD_DIM, dtype=dtype, device=META)
        parameters = torch.empty(2, HEAD_DIM, dtype=torch.float32, device=META) if norm else None
        angles = torch.empty(MAX_POSITION, ROTARY_DIM // 2, device=META)
        cache = layer_cache(block_size, stored)
        q = qk_norm_rotary_store(qkv, parameters, parameters, 1e-5, angles, angles, cache, plan, pdl=pdl)
        prefill_attention(q, cache, plan, pdl=pdl)

    return call


def _store_decodes() -> None:
    """What the batch-invariant mode stores of a decode step."""
    sequences, block_size = 64, 32
    parameters = torch.empty(2, HEAD_DIM, dtype=torch.float32, device=META)
    angles = torch.empty(MAX_POSITION, ROTARY_DIM // 2, device=META)
    last = LastTokens(
        torch.empty(sequences, dtype=torch.int32, device=META),
        torch.empty(sequences, MAX_POSITION // block_size, dtype=torch.int32, device=META),
    )
    qkv = torch.empty(sequences, HEADS, 3, HEAD_DIM, dtype=torch.float16, device=META)
    cache = layer_cache(block_size, torch.float16)
    qk_norm_rotary_store(qkv, parameters, parameters, 1e-5, angles, angles, cache, last, exact=True)


CALLS: dict[str, Callable[[], None]] = {
    "store of decodes": _store_decodes,
    "prompts": _call([2048, 77]),
    "prompts in blocks of 16": _call([2048], block_size=16),
    "prompts in blocks of 64": _call([2048], block_size=64),
    "prompts in bfloat16": _call([2048], dtype=torch.bfloat16),
    "prompts in float32": _call([2048], dtype=torch.float32),
    "prompts without QK-norm": _call([2048], norm=False),
    "drafts": _call([5, 2, 8]),
    "drafts in blocks of 16": _call([5, 2, 8], block_size=16),
    "drafts in float32": _call([5, 2, 8], dtype=torch.float32),
    "prompts, dependent": _call([2048], pdl=True),
    "prompts, int8": _call([2048], cache_dtype=torch.int8),
    "prompts, int8, bfloat16": _call([2048], dtype=torch.bfloat16, cache_dtype=torch.int8),
    "prompts, int8, blocks of 16": _call([2048], block_size=16, cache_dtype=torch.int8),
    "prompts, fp8": _call([2048], cache_dtype=torch.float8_e4m3fn),
    "prompts, fp8, bfloat16": _call([2048], dtype=torch.bfloat16, cache_dtype=torch.float8_e4m3fn),
    "drafts, int8": _call([5, 2, 8], cache_dtype=torch.int8),
    "drafts, fp8": _call([5, 2, 8], cache_dtype=torch.float8_e4m3fn),
}

PIPELINED = r"LDGSTS\.E\.BYPASS\.128"
ON_TENSOR_CORES = {"prompts": r"HGMMA", "drafts": r"HMMA"}
EXPECTED: dict[str, tuple[str, ...]] = {
    name: (r"LDG\.E\.128", PIPELINED, *(() if "float32" in name else (ON_TENSOR_CORES[name.split()[0].strip(",")],)))
    for name in CALLS
    if name != "store of decodes"
}
EXHAUSTIVE_ONLY = set(CALLS) - {"prompts", "drafts", "prompts in blocks of 16", "store of decodes"}
EVERY_GENERATION = {"prompts"}
