"""lm_head with its draws as a step of the 8B model calls it, on meta tensors."""

from collections.abc import Callable
from functools import partial

import torch

from persimmon.kernels.head import sample_head
from persimmon.kernels.packed_weight import PackedWeight
from persimmon.kernels.quantized import QuantizedFormat
from persimmon.kernels.sampling import Workspace
from tests.kernels.production_calls_packed_projection import FORMATS, packed_here
from tests.kernels.production_calls_sampling import HIDDEN, META, VOCAB, draw_inputs, live

F16, BF16 = torch.float16, torch.bfloat16


def _draw(
    rows: int, head: torch.Tensor | PackedWeight, dtype: torch.dtype, *, logits: bool = True, pdl: bool = False
) -> None:
    sample_head(
        torch.empty(rows, HIDDEN, dtype=dtype, device=META),
        head,
        draw_inputs(rows),
        live(),
        Workspace.allocate(rows, VOCAB, META),
        logits=torch.empty(rows, VOCAB, device=META) if logits else None,
        pdl=pdl,
    )


def _dense(rows: int, dtype: torch.dtype = F16, *, logits: bool = True, pdl: bool = False) -> None:
    _draw(rows, torch.empty(VOCAB, HIDDEN, dtype=dtype, device=META), dtype, logits=logits, pdl=pdl)


def _packed(rows: int, stored: QuantizedFormat, dtype: torch.dtype = F16, *, pdl: bool = False) -> None:
    _draw(rows, packed_here((VOCAB, HIDDEN), stored), dtype, pdl=pdl)


QUANTIZED: dict[str, Callable[[], None]] = {
    "int8 head, 1 row": partial(_packed, 1, FORMATS["int8"]),
    "int8 head, 32 rows": partial(_packed, 32, FORMATS["int8"]),
    "int8 head, 64 rows": partial(_packed, 64, FORMATS["int8"]),
    "int4 head, 1 row": partial(_packed, 1, FORMATS["int4_g128"]),
    "int4 head, 64 rows": partial(_packed, 64, FORMATS["int4_g128"]),
    "int8 head, bfloat16": partial(_packed, 16, FORMATS["int8"], BF16),
    "int8 head, dependent": partial(_packed, 1, FORMATS["int8"], pdl=True),
}
CALLS: dict[str, Callable[[], None]] = {
    "head, 1 row": partial(_dense, 1),
    "head, 32 rows": partial(_dense, 32),
    "head, 64 rows": partial(_dense, 64),
    "head, 64 rows, no logits": partial(_dense, 64, logits=False),
    "head, 16 rows, bfloat16": partial(_dense, 16, BF16),
    "head, dependent": partial(_dense, 16, logits=False, pdl=True),
} | QUANTIZED
KINDS = dict.fromkeys(QUANTIZED, "quantized")
EXPECTED: dict[str, tuple[str, ...]] = dict.fromkeys(
    CALLS, (r"HGMMA\.64x\d+x16\.F32(\.BF16)? R", r"LDGSTS\.E\.BYPASS\.128")
)
EVERY_GENERATION = {"head, 64 rows"}
EXHAUSTIVE_ONLY = (QUANTIZED.keys() - {"int8 head, 64 rows"}) | {"head, dependent", "head, 16 rows, bfloat16"}
