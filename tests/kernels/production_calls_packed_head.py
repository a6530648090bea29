"""The quantized lm_head with its draws as a step of the 8B model calls it, on meta tensors."""

from collections.abc import Callable
from functools import partial

import torch

from persimmon.kernels.packed_head import sample_head
from persimmon.kernels.quantized import QuantizedFormat
from persimmon.kernels.sampling import Workspace
from tests.kernels.production_calls_packed_projection import FORMATS, packed_here
from tests.kernels.production_calls_sampling import HIDDEN, META, VOCAB, draw_inputs, live


def head(rows: int, stored: QuantizedFormat, *, dtype: torch.dtype = torch.float16, pdl: bool = False) -> None:
    sample_head(
        torch.empty(rows, HIDDEN, dtype=dtype, device=META),
        packed_here((VOCAB, HIDDEN), stored),
        draw_inputs(rows),
        live(),
        Workspace.allocate(rows, VOCAB, META),
        logits=torch.empty(rows, VOCAB, device=META),
        pdl=pdl,
    )


CALLS: dict[str, Callable[[], None]] = {
    "int8 head, 1 row": partial(head, 1, FORMATS["int8"]),
    "int8 head, 32 rows": partial(head, 32, FORMATS["int8"]),
    "int8 head, 64 rows": partial(head, 64, FORMATS["int8"]),
    "int4 head, 1 row": partial(head, 1, FORMATS["int4_g128"]),
    "int4 head, 64 rows": partial(head, 64, FORMATS["int4_g128"]),
    "int8 head, bfloat16": partial(head, 16, FORMATS["int8"], dtype=torch.bfloat16),
    "int8 head, dependent": partial(head, 1, FORMATS["int8"], pdl=True),
}
EXPECTED: dict[str, tuple[str, ...]] = dict.fromkeys(
    CALLS, (r"HGMMA\.64x\d+x16\.F32(\.BF16)? R", r"LDGSTS\.E\.BYPASS\.128")
)
EVERY_GENERATION: set[str] = set()
COMPAT_ONLY = set(CALLS) - {"int8 head, 64 rows"}
