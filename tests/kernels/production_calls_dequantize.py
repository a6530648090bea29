"""Dequantizing the matrices of the 8B model, on meta tensors."""

from collections.abc import Callable
from functools import partial

import torch

from persimmon.kernels.dequantize import dequantize
from persimmon.kernels.quantized import QuantizedFormat
from tests.kernels.production_calls_packed_projection import FORMATS, packed_here
from tests.kernels.production_calls_projection import HIDDEN, INTERMEDIATE, META


def _dequantize(stored: QuantizedFormat, *, columns: bool, dtype: torch.dtype = torch.float16) -> None:
    shape = (HIDDEN, INTERMEDIATE) if columns else (INTERMEDIATE, HIDDEN)
    buffer = torch.empty(HIDDEN * INTERMEDIATE, dtype=dtype, device=META)
    dequantize(packed_here(shape, stored, columns=columns), buffer, 0, shape[0])


CALLS: dict[str, Callable[[], None]] = {
    f"{'down' if columns else 'up'}_{name}": partial(_dequantize, stored, columns=columns)
    for name, stored in FORMATS.items()
    for columns in (False, True)
}
CALLS["up_int8_bf16"] = partial(_dequantize, FORMATS["int8"], columns=False, dtype=torch.bfloat16)
EXPECTED: dict[str, tuple[str, ...]] = dict.fromkeys(CALLS, (r"LDG\.E\.128", r"STG\.E\.128"))
EVERY_GENERATION: set[str] = set()
EXHAUSTIVE_ONLY = set(CALLS) - {"up_int4_g128"}
