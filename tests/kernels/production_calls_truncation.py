"""The truncation kernels' launches at the 8B model's shapes, for compilation ahead of time."""

from collections.abc import Callable
from functools import partial

import torch

from persimmon.kernels.operands import PenaltyInputs, TruncationInputs
from persimmon.kernels.sampling import Workspace
from persimmon.kernels.truncation import TruncationWorkspace, apply_penalties, sample_truncated
from tests.kernels.production_calls_sampling import META, VOCAB, draw_inputs, live


def truncated(rows: int, *, pdl: bool = False) -> None:
    def empty(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(rows, dtype=dtype, device=META)

    sample_truncated(
        torch.empty(rows, VOCAB, device=META),
        draw_inputs(rows),
        TruncationInputs(
            active=empty(torch.int32), top_k=empty(torch.int32), top_p=empty(torch.float32), min_p=empty(torch.float32)
        ),
        live(),
        Workspace.allocate(rows, VOCAB, META),
        TruncationWorkspace.allocate(rows, VOCAB, META),
        pdl=pdl,
    )


def penalised(rows: int, entries: int, *, pdl: bool = False) -> None:
    def empty(size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=META)

    costs = [empty(rows, torch.float32) for _ in range(3)]
    penalties = PenaltyInputs(empty(rows + 1), empty(entries), empty(entries), *costs)
    apply_penalties(torch.empty(rows, VOCAB, device=META), penalties, live(), pdl=pdl)


CALLS: dict[str, Callable[[], None]] = {
    "truncated": partial(truncated, 64),
    "penalised": partial(penalised, 64, 2**17),
    "truncated, dependent": partial(truncated, 64, pdl=True),
    "penalised, dependent": partial(penalised, 64, 2**17, pdl=True),
}
EXPECTED: dict[str, tuple[str, ...]] = {"truncated": (r"LDG\.E\.128",)}
EXHAUSTIVE_ONLY = {"truncated, dependent", "penalised, dependent"}
EVERY_GENERATION: set[str] = set()
