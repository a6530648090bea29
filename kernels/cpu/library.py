"""The compiled C code: finds the build for this processor, and mirrors the structures of network.h.

Knows nothing of tensors.
"""

import ctypes
from collections.abc import Mapping
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np

from persimmon.kernels.launch import KernelsUnavailableError

BUILDS: Mapping[str, frozenset[str]] = {
    "avx512_bf16": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"}),
    "avx512_vnni": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
    "avx_vnni": frozenset({"avx2", "fma", "f16c", "bmi2", "avx_vnni"}),
    "avx2": frozenset({"avx2", "fma", "f16c", "bmi2"}),
}
"""What each build needs, by the names of /proc/cpuinfo; the fastest first."""

EMBED, LINEAR, ATTENTION, NORM_ROWS, DRAW, TAKE_ROWS = range(6)
STORE, STORE_RELU_SQUARED, ADD = range(3)
FLOAT32, FLOAT16, BFLOAT16, INT8, INT4 = range(5)


class Operation(ctypes.Structure):
    """One operation of a program; network.h says which fields each kind uses."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "type", "finish", "rounds", "sparse", "in_", "out")),
        *((name, ctypes.c_int64) for name in ("heads", "head_dim", "rotary", "block_size")),
        *((name, ctypes.c_int64) for name in ("group", "scale_type", "integer", "of_rows")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("input", "output", "norm_weight", "norm_bias", "weight", "bias")),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("scales", "cache_scales")),
    )


class Step(ctypes.Structure):
    """What a program runs on; network.h says what the fields hold."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "sequences", "rows")),
        *((name, ctypes.c_void_p) for name in ("token_ids", "sampled", "starts", "firsts", "tables", "table_firsts")),
        *((name, ctypes.c_void_p) for name in ("row_ids", "hidden", "draws", "drawn")),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine")),
    )


class WeightRounding(ctypes.Structure):
    """A matrix that becomes 8 or 4 bits; network.h says what the fields hold."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "numbers", "scales", "steps", "failed")),
        *((name, ctypes.c_int64) for name in ("rows", "in_", "group", "type", "scale_type", "bits")),
        *((name, ctypes.c_int64) for name in ("step_count", "refits")),
    )


DRAWS = np.dtype(
    [
        *((name, np.float64) for name in ("temperature", "top_p", "min_p")),
        *((name, np.int64) for name in ("top_k", "seed", "sample_index", "position")),
    ]
)
"""How rows draw, by the names of network.h."""


def library_path(build: str) -> Path:
    """Where installing the project has put a build, if it could be compiled."""
    return Path(__file__).parent / f"_{build}{EXTENSION_SUFFIXES[0]}"


def processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The processor's instruction sets, by their names in /proc/cpuinfo; empty if that file does not exist."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def builds() -> list[str]:
    """The builds that are there and that this processor runs, the fastest first."""
    flags = processor_flags()
    return [build for build, needed in BUILDS.items() if needed <= flags and library_path(build).exists()]


@cache
def load(build: str) -> ctypes.CDLL:
    """A build's functions, typed.

    Raises:
        OSError: it cannot be loaded.
        KernelsUnavailableError: it was compiled from other sources than these.
    """
    path = library_path(build)
    library = ctypes.CDLL(str(path))
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    sizes = (ctypes.sizeof(WeightRounding), ctypes.sizeof(Operation), ctypes.sizeof(Step), DRAWS.itemsize)
    # A build without the function is older than the function.
    layout = getattr(library, "persimmon_layout", None)
    if layout is not None:
        layout.argtypes, layout.restype = (), integer
    if layout is None or layout() != sizes[0] << 30 | sizes[1] << 20 | sizes[2] << 10 | sizes[3]:
        raise KernelsUnavailableError(
            f"{path} was compiled from a different version of the C kernels; reinstall the project (`pip install -e "
            f".` in a checkout)"
        )
    library.persimmon_scratch_bytes.argtypes = (integer, integer)
    library.persimmon_scratch_bytes.restype = integer
    library.persimmon_run.argtypes = (pointer, integer, pointer, pointer, integer, integer)
    library.persimmon_run.restype = integer
    library.persimmon_pack.argtypes = (pointer, pointer, integer, integer, integer, integer, integer)
    library.persimmon_pack.restype = None
    library.persimmon_pack_quantized.argtypes = (pointer, pointer, pointer, pointer, integer)
    library.persimmon_pack_quantized.restype = None
    library.persimmon_packed_bytes.argtypes = (pointer,)
    library.persimmon_packed_bytes.restype = integer
    library.persimmon_round_weights.argtypes = (pointer, integer)
    library.persimmon_round_weights.restype = None
    library.persimmon_multiplies_bfloat16.argtypes = ()
    library.persimmon_multiplies_bfloat16.restype = integer
    return library
