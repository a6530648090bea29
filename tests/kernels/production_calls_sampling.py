"""The sampling kernels' launches at the 8B model's shapes, for compilation ahead of time."""

from collections.abc import Callable
from functools import partial

import torch

from persimmon.kernels.operands import DrawInputs
from persimmon.kernels.sampling import Workspace, sample_head, sample_logits

HIDDEN, VOCAB = 4096, 262144
META = torch.device("meta")


def draw_inputs(rows: int) -> DrawInputs:
    def empty(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(rows, dtype=dtype, device=META)

    return DrawInputs(
        temperature=empty(torch.float32),
        seed=empty(torch.int64),
        sample_index=empty(torch.int32),
        position=empty(torch.int32),
        wants_logits=empty(torch.int32),
    )


def live() -> torch.Tensor:
    return torch.empty(1, dtype=torch.int32, device=META)


def head(rows: int, dtype: torch.dtype, with_logits: bool, *, pdl: bool = False) -> None:
    sample_head(
        torch.empty(rows, HIDDEN, dtype=dtype, device=META),
        torch.empty(VOCAB, HIDDEN, dtype=dtype, device=META),
        draw_inputs(rows),
        live(),
        Workspace.allocate(rows, VOCAB, META),
        logits=torch.empty(rows, VOCAB, device=META) if with_logits else None,
        pdl=pdl,
    )


def from_logits(rows: int, dtype: torch.dtype, *, pdl: bool = False) -> None:
    logits = torch.empty(rows, VOCAB, dtype=dtype, device=META)
    sample_logits(logits, draw_inputs(rows), live(), Workspace.allocate(rows, VOCAB, META), pdl=pdl)


CALLS: dict[str, Callable[[], None]] = {
    "head, 1 row": partial(head, 1, torch.float16, True),
    "head, 32 rows": partial(head, 32, torch.float16, True),
    "head, 64 rows": partial(head, 64, torch.float16, True),
    "head, 64 rows, no logits": partial(head, 64, torch.float16, False),
    "head, 16 rows, bfloat16": partial(head, 16, torch.bfloat16, True),
    "head, dependent": partial(head, 16, torch.float16, False, pdl=True),
    "logits, float16": partial(from_logits, 128, torch.float16),
    "logits, float32": partial(from_logits, 128, torch.float32),
    "logits, dependent": partial(from_logits, 128, torch.float32, pdl=True),
}
_PIPELINED = (r"HGMMA", r"LDGSTS\.E\.BYPASS\.128")
EXPECTED: dict[str, tuple[str, ...]] = {
    name: _PIPELINED if name.startswith("head") else (r"LDG\.E\.128",) for name in CALLS
}
COMPAT_ONLY = {"head, dependent", "logits, dependent", "head, 16 rows, bfloat16", "logits, float16"}
EVERY_GENERATION = {"head, 64 rows"}
