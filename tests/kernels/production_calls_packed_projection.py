"""The projections with quantized weights as a step of the 8B model calls them, on meta tensors."""

from collections.abc import Callable
from functools import partial

import torch
from triton.runtime import driver

from persimmon.kernels.layer_norm import statistics_shape
from persimmon.kernels.packed_projection import MAX_SPLITS, project, project_add_
from persimmon.kernels.packed_weight import PackedWeight
from persimmon.kernels.projection_config import Norm, Workspace
from persimmon.kernels.quantized import Bits, QuantizedFormat
from tests.kernels.production_calls_projection import HIDDEN, INTERMEDIATE, META
from tests.kernels.quantized_matrices import packed_shape


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def packed_here(shape: tuple[int, int], stored: QuantizedFormat, *, columns: bool = False) -> PackedWeight:
    """Laid out for the GPU that is compiled for."""
    generation = driver.active.get_current_target().arch // 10
    return packed_shape(shape, stored, columns=columns, generation=generation)


def _workspace(rows: int, out_features: int) -> Workspace:
    counters = _empty(out_features // 64 * 4, dtype=torch.int32)
    return Workspace(_empty(MAX_SPLITS * rows * out_features, dtype=torch.float32), counters)


def _wide(
    out_features: int, rows: int, dtype: torch.dtype, stored: QuantizedFormat, *, relu: bool, pdl: bool = False
) -> None:
    project(
        _empty(rows, HIDDEN, dtype=dtype),
        packed_here((out_features, HIDDEN), stored),
        _empty(out_features, dtype=dtype),
        norm=Norm(
            statistics=_empty(*statistics_shape(rows, HIDDEN), dtype=torch.float32),
            weight=_empty(HIDDEN, dtype=torch.float32),
            bias=_empty(HIDDEN, dtype=torch.float32),
            eps=1e-5,
        ),
        activation="relu_squared" if relu else "none",
        live=_empty(1, dtype=torch.int32),
        workspace=_workspace(rows, out_features),
        pdl=pdl,
    )


def _added(
    in_features: int, rows: int, dtype: torch.dtype, stored: QuantizedFormat, *, masked: bool = False, pdl: bool = False
) -> None:
    project_add_(
        _empty(rows, HIDDEN, dtype=dtype),
        _empty(rows, in_features, dtype=dtype),
        packed_here((HIDDEN, in_features), stored, columns=in_features == INTERMEDIATE),
        _empty(HIDDEN, dtype=dtype),
        alive=_empty(in_features, dtype=torch.int8) if masked else None,
        live=_empty(1, dtype=torch.int32),
        workspace=_workspace(rows, HIDDEN),
        pdl=pdl,
    )


def _calls(rows: int, dtype: torch.dtype, stored: QuantizedFormat, *, pdl: bool = False) -> dict[str, Callable]:
    masked = {"mlp_down_masked": partial(_added, INTERMEDIATE, rows, dtype, stored, masked=True, pdl=pdl)}
    return {
        "query_key_value": partial(_wide, 3 * HIDDEN, rows, dtype, stored, relu=False, pdl=pdl),
        "mlp_up": partial(_wide, INTERMEDIATE, rows, dtype, stored, relu=True, pdl=pdl),
        "attention_out": partial(_added, HIDDEN, rows, dtype, stored, pdl=pdl),
        "mlp_down": partial(_added, INTERMEDIATE, rows, dtype, stored, pdl=pdl),
        **(masked if rows <= 16 else {}),
    }


def _format(bits: Bits, group_size: int | None, scale_dtype: torch.dtype = torch.float16) -> QuantizedFormat:
    return QuantizedFormat(bits, group_size, scale_dtype)


FORMATS = {
    "int8": _format(8, None),
    "int8_g32": _format(8, 32),
    "int4_g128": _format(4, 128),
    "int4_g32": _format(4, 32),
}
CALLS: dict[str, Callable[[], None]] = {
    f"{name}_{stored}_fp16_{rows}": call
    for stored in ("int8", "int4_g128", "int4_g32")
    for rows in (16, 32, 64)
    for name, call in _calls(rows, torch.float16, FORMATS[stored]).items()
}
CALLS |= {f"{name}_int8_g32_fp16_16": call for name, call in _calls(16, torch.float16, FORMATS["int8_g32"]).items()}
CALLS |= {
    f"{name}_{title}_bf16_16": call
    for title, stored in (("int8", FORMATS["int8"]), ("int4_g32", _format(4, 32, torch.bfloat16)))
    for name, call in _calls(16, torch.bfloat16, stored).items()
}
CALLS |= {f"{name}_int4_g128_fp32_16": call for name, call in _calls(16, torch.float32, FORMATS["int4_g128"]).items()}
CALLS |= {
    f"{name}_dependent_int4_g128_fp16_16": call
    for name, call in _calls(16, torch.float16, FORMATS["int4_g128"], pdl=True).items()
}
# A step of more rows, of 64 at a time; its neurons' flags are of no use.
CALLS |= {"mlp_up_int8_fp16_256": _calls(256, torch.float16, FORMATS["int8"])["mlp_up"]}

KINDS = {name: f"{min(64, max(16, int(name.rpartition('_')[2])))} rows".replace("32 rows", "64 rows") for name in CALLS}
"""The kind of call that the kernel's bounds distinguish."""

EXPECTED: dict[str, tuple[str, ...]] = {
    # Tiles of 16 bytes a thread on their way while others are multiplied; float32 has no such matrix units.  Numbers
    # of rows come out of shared memory 16 bytes at a time, those of columns two.
    name: (r"LDGSTS\.E\.BYPASS\.128",)
    if "fp32" in name
    else (
        r"LDGSTS\.E\.BYPASS\.128",
        r"HGMMA\.64x\d+x16\.F32(\.BF16)? R",
        r"LDS\.U16" if "mlp_down" in name else r"LDS\.128",
    )
    for name in CALLS
}
EVERY_GENERATION = {"mlp_up_int4_g128_fp16_16"}
EXHAUSTIVE_ONLY = set(CALLS) - EVERY_GENERATION - {"mlp_down_masked_int8_fp16_16", "attention_out_int4_g32_fp16_64"}
