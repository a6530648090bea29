"""The batch-invariant products as a step of the 8B model with 2,048 tokens calls them, on meta tensors."""

from collections.abc import Callable
from functools import partial

import torch

from persimmon.kernels.invariant_projection import project_rows, project_rows_add_
from persimmon.kernels.projection_config import ATTENTION_OUT, MLP_DOWN, WIDE
from tests.kernels.production_calls_projection import HIDDEN, INTERMEDIATE, META

ROWS, VOCAB_SIZE = 2048, 262144


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def up(dtype: torch.dtype) -> None:
    weight, bias = _empty(INTERMEDIATE, HIDDEN, dtype=dtype), _empty(INTERMEDIATE, dtype=dtype)
    project_rows(_empty(ROWS, HIDDEN, dtype=dtype), weight, bias, activation="relu_squared", config=WIDE)


def attention_out(dtype: torch.dtype) -> None:
    x = _empty(ROWS, HIDDEN, dtype=dtype)
    project_rows_add_(x, x, _empty(HIDDEN, HIDDEN, dtype=dtype), _empty(HIDDEN, dtype=dtype), config=ATTENTION_OUT)


def down(dtype: torch.dtype) -> None:
    weight, bias = _empty(INTERMEDIATE, HIDDEN, dtype=dtype), _empty(HIDDEN, dtype=dtype)
    inner = _empty(ROWS, INTERMEDIATE, dtype=dtype)
    project_rows_add_(_empty(ROWS, HIDDEN, dtype=dtype), inner, weight, bias, transposed=True, config=MLP_DOWN)


def logits(dtype: torch.dtype) -> None:
    weight = _empty(VOCAB_SIZE, HIDDEN, dtype=dtype)
    project_rows(_empty(32, HIDDEN, dtype=dtype), weight, None, config=WIDE, dtype=torch.float32)


def image_patches(dtype: torch.dtype) -> None:
    """Of Fuyu-8B: 2,700 numbers a patch, and zeros up to a multiple of 16."""
    weight, bias = _empty(HIDDEN, 2704, dtype=dtype), _empty(HIDDEN, dtype=dtype)
    project_rows(_empty(256, 2704, dtype=dtype), weight, bias, config=ATTENTION_OUT)


CALLS: dict[str, Callable[[], None]] = {
    f"{call.__name__}_{dtype_name}": partial(call, dtype)
    for dtype_name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32))
    for call in (up, attention_out, down, logits, *(() if dtype_name == "fp32" else (image_patches,)))
}
EXHAUSTIVE_ONLY = {name for name in CALLS if "fp16" not in name or "logits" in name}
EVERY_GENERATION: set[str] = set()

EXPECTED: dict[str, tuple[str, ...]] = {
    name: (r"LDGSTS\.E\.BYPASS\.128",) if "fp32" in name else (r"LDGSTS\.E\.BYPASS\.128", r"HGMMA\.64x\d+x16\.F32")
    for name in CALLS
}
