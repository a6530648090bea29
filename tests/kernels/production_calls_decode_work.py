"""The work list of decode attention as the 8B model's steps make it, on meta tensors."""

from collections.abc import Callable
from functools import partial

import torch

from persimmon.kernels.decode_work import build_work_list
from tests.kernels.production_calls_decode_attention import META, SEQUENCES, workspace


def _work_list(pdl: bool = False) -> None:
    build_work_list(torch.empty(SEQUENCES, dtype=torch.int32, device=META), workspace(), pdl=pdl)


CALLS: dict[str, Callable[[], None]] = {"work list": _work_list, "dependent": partial(_work_list, pdl=True)}
EXPECTED: dict[str, tuple[str, ...]] = {}
EVERY_GENERATION: set[str] = set()
EXHAUSTIVE_ONLY = {"dependent"}
