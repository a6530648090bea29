"""The sampling kernels' launches at the 8B model's shapes, for compilation ahead of time."""

from collections.abc import Callable
from functools import partial

import torch

from persimmon.kernels.operands import DrawInputs
from persimmon.kernels.sampling import Workspace, sample_logits

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


def from_logits(rows: int, dtype: torch.dtype, *, pdl: bool = False) -> None:
    logits = torch.empty(rows, VOCAB, dtype=dtype, device=META)
    sample_logits(logits, draw_inputs(rows), live(), Workspace.allocate(rows, VOCAB, META), pdl=pdl)


CALLS: dict[str, Callable[[], None]] = {
    "logits, float16": partial(from_logits, 128, torch.float16),
    "logits, float32": partial(from_logits, 128, torch.float32),
    "logits, dependent": partial(from_logits, 128, torch.float32, pdl=True),
}
EXPECTED: dict[str, tuple[str, ...]] = dict.fromkeys(CALLS, (r"LDG\.E\.128",))
EXHAUSTIVE_ONLY = {"logits, dependent", "logits, float16"}
EVERY_GENERATION: set[str] = set()
