"""Embedding, LayerNorm and squared ReLU as steps of the 8B model call them, on meta tensors."""

from collections.abc import Callable
from functools import partial

import torch

from persimmon.kernels.layer_norm import bias_relu_squared_, embed, layer_norm, statistics_shape
from persimmon.kernels.quantized import QuantizedMatrix

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 16384, 262144


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _embed(rows: int, dtype: torch.dtype, *, pdl: bool = False) -> None:
    embed(
        _empty(rows, dtype=torch.int64),
        _empty(rows, dtype=torch.int64),
        _empty(VOCABULARY, HIDDEN, dtype=dtype),
        _empty(1, dtype=torch.int32),
        pdl=pdl,
    )


def _embed_bytes(rows: int, dtype: torch.dtype, *, pdl: bool = False) -> None:
    numbers, scales = _empty(VOCABULARY, HIDDEN, dtype=torch.int8), _empty(VOCABULARY, 1, dtype=dtype)
    table = QuantizedMatrix(numbers, scales, bits=8, group_size=HIDDEN)
    sampled, live = _empty(rows, dtype=torch.int64), _empty(1, dtype=torch.int32)
    embed(_empty(rows, dtype=torch.int64), sampled, table, live, pdl=pdl)


def _norm(rows: int, dtype: torch.dtype, *, merged: bool, pdl: bool = False) -> None:
    layer_norm(
        _empty(rows, HIDDEN, dtype=dtype),
        _empty(*statistics_shape(rows, HIDDEN), dtype=torch.float32) if merged else None,
        _empty(HIDDEN, dtype=torch.float32),
        _empty(HIDDEN, dtype=torch.float32),
        1e-5,
        residual=None if merged else _empty(rows, HIDDEN, dtype=dtype),
        pdl=pdl,
    )


def _activation(rows: int, dtype: torch.dtype, *, pdl: bool = False) -> None:
    bias_relu_squared_(_empty(rows, INTERMEDIATE, dtype=dtype), _empty(INTERMEDIATE, dtype=dtype), pdl=pdl)


_LAUNCHES: dict[str, Callable[..., None]] = {
    "embed": partial(_embed, 16),
    "embed_bytes": partial(_embed_bytes, 16),
    "merged_norm": partial(_norm, 64, merged=True),
    "row_norm": partial(_norm, 2048, merged=False),
    "bias_relu_squared": partial(_activation, 2048),
}
CALLS: dict[str, Callable[[], None]] = {
    f"{name}_{dtype_name}": partial(call, dtype=dtype)
    for dtype_name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32))
    for name, call in _LAUNCHES.items()
}
CALLS |= {f"{name}_dependent": partial(call, dtype=torch.float16, pdl=True) for name, call in _LAUNCHES.items()}

KINDS = {"embed_bytes_fp32": "8-bit table in float32"}

_LOADS = (r"LDG\.E\.128", r"STG\.E\.128")
EXPECTED: dict[str, tuple[str, ...]] = {
    name: (r"LDG\.E\.64", r"STG\.E\.128") if "bytes" in name else _LOADS for name in CALLS
}
EXHAUSTIVE_ONLY = {name for name in CALLS if not name.endswith("fp16") or "bytes" in name}
EVERY_GENERATION: set[str] = set()
SCALARS = {name for name in CALLS if "bytes" in name}
"""A row of an 8-bit embedding has one scale."""
