"""The projections as a decode step of the 8B model calls them, on meta tensors."""

from collections.abc import Callable
from functools import partial

import torch

from persimmon.kernels.layer_norm import statistics_shape
from persimmon.kernels.projection import project, project_add_
from persimmon.kernels.projection_config import ATTENTION_OUT, MLP_DOWN, WIDE, Norm, ProjectionConfig, Workspace

HIDDEN, INTERMEDIATE = 4096, 16384
META = torch.device("meta")


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def _workspace(rows: int, out_features: int, config: ProjectionConfig) -> Workspace:
    return Workspace.allocate([(out_features, config)], rows, META)


def _wide(out_features: int, rows: int, dtype: torch.dtype, *, relu: bool, pdl: bool = False) -> None:
    project(
        _empty(rows, HIDDEN, dtype=dtype),
        _empty(out_features, HIDDEN, dtype=dtype),
        _empty(out_features, dtype=dtype),
        norm=Norm(
            statistics=_empty(*statistics_shape(rows, HIDDEN), dtype=torch.float32),
            weight=_empty(HIDDEN, dtype=torch.float32),
            bias=_empty(HIDDEN, dtype=torch.float32),
            eps=1e-5,
        ),
        activation="relu_squared" if relu else "none",
        live=_empty(1, dtype=torch.int32),
        workspace=_workspace(rows, out_features, WIDE),
        pdl=pdl,
    )


def _attention_out(rows: int, dtype: torch.dtype, *, pdl: bool = False) -> None:
    project_add_(
        _empty(rows, HIDDEN, dtype=dtype),
        _empty(rows, HIDDEN, dtype=dtype),
        _empty(HIDDEN, HIDDEN, dtype=dtype),
        _empty(HIDDEN, dtype=dtype),
        live=_empty(1, dtype=torch.int32),
        workspace=_workspace(rows, HIDDEN, ATTENTION_OUT),
        config=ATTENTION_OUT,
        pdl=pdl,
    )


def _down(rows: int, dtype: torch.dtype, *, masked: bool, pdl: bool = False) -> None:
    project_add_(
        _empty(rows, HIDDEN, dtype=dtype),
        _empty(rows, INTERMEDIATE, dtype=dtype),
        _empty(INTERMEDIATE, HIDDEN, dtype=dtype),
        _empty(HIDDEN, dtype=dtype),
        transposed=True,
        alive=_empty(INTERMEDIATE, dtype=torch.int8) if masked else None,
        live=_empty(1, dtype=torch.int32),
        workspace=_workspace(rows, HIDDEN, MLP_DOWN),
        config=MLP_DOWN,
        pdl=pdl,
    )


def _calls(rows: int, dtype: torch.dtype, *, pdl: bool = False) -> dict[str, Callable[[], None]]:
    masked = {"mlp_down_masked": partial(_down, rows, dtype, masked=True, pdl=pdl)} if rows <= 16 else {}
    return {
        "query_key_value": partial(_wide, 3 * HIDDEN, rows, dtype, relu=False, pdl=pdl),
        "mlp_up": partial(_wide, INTERMEDIATE, rows, dtype, relu=True, pdl=pdl),
        "attention_out": partial(_attention_out, rows, dtype, pdl=pdl),
        "mlp_down": partial(_down, rows, dtype, masked=False, pdl=pdl),
        **masked,
    }


CALLS: dict[str, Callable[[], None]] = {
    f"{name}_{dtype_name}_{rows}": call
    for dtype_name, dtype, buckets in (
        ("fp16", torch.float16, (16, 32, 64, 256)),
        ("bf16", torch.bfloat16, (16,)),
        ("fp32", torch.float32, (16,)),
    )
    for rows in buckets
    for name, call in _calls(rows, dtype).items()
}
CALLS |= {f"{name}_dependent_fp16_16": call for name, call in _calls(16, torch.float16, pdl=True).items()}

KINDS = {name: "float32" if "fp32" in name else f"{name.rpartition('_')[2]} rows" for name in CALLS}
"""The kind of call that the kernel's bounds distinguish."""

EXPECTED: dict[str, tuple[str, ...]] = {
    # Tiles of 16 bytes a thread on their way while others are multiplied; float32 has no such matrix units.
    name: (r"LDGSTS\.E\.BYPASS\.128",) if "fp32" in name else (r"LDGSTS\.E\.BYPASS\.128", r"HGMMA\.64x\d+x16\.F32")
    for name in CALLS
}
EXHAUSTIVE_ONLY = {
    name
    for name in CALLS
    if name.endswith("_256")
    or ("fp16" not in name and "mlp_up" not in name)
    or ("dependent" in name and "attention_out" not in name and "query_key_value" not in name)
}
EVERY_GENERATION = {"query_key_value_fp16_16", "mlp_down_masked_fp16_16", "mlp_up_fp16_64", "mlp_up_fp32_16"}
