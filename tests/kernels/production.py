"""The launches of the 8B model whose machine code is read, and which of them `make test` compiles.

A cold compilation takes half a second to a second of CPU, so `make test` compiles for sm_90 what a server launches in
float16, and for older and newer GPUs only the kernels that multiply matrices, whose code differs there in more than
registers.  `make exhaustive` compiles the whole matrix: tests/exhaustive/test_machine_code.py.

Each module of calls has:
    CALLS: what to launch, by name; "dependent" ones may start while their predecessor ends, which takes sm_90, and
        "fp8" ones convert such numbers, which takes sm_89.
    EXPECTED: patterns that the machine code for sm_90 must contain, by name of the call.
    EXHAUSTIVE_ONLY: names of calls that only `make exhaustive` compiles.
    EVERY_GENERATION: names of calls that `make test` compiles for sm_80 and sm_100 too.
    SCALARS: optionally, names of calls that read single 16-bit numbers.
    KINDS: optionally, by name, the kind of call that the kernel's bounds distinguish.
"""

import importlib
from collections.abc import Callable
from types import ModuleType

CAPABILITIES = (80, 90, 100)
TAKES = {"dependent": 90, "fp8": 89}
"""The compute capability that calls with such a word in their names take."""
MODULES = (
    *("decode_work", "decode_attention", "prefill_attention", "projection", "layer_norm", "head", "sampling"),
    *("truncation", "invariant_attention", "invariant_projection", "packed_projection", "dequantize"),
)
"""Modules of persimmon.kernels that have calls."""


def calls_of(module: str) -> ModuleType:
    """The module of calls that belongs to a module of kernels."""
    return importlib.import_module(f"tests.kernels.production_calls_{module}")


def selected(module: str, capability: int, *, whole: bool) -> dict[str, Callable[[], None]]:
    """A module's calls that are compiled for a compute capability, all of them or those of `make test`, by name."""
    calls = calls_of(module)
    if whole:
        names = {name for name in calls.CALLS if all(capability >= TAKES[word] for word in TAKES if word in name)}
    else:
        names = set(calls.CALLS) - calls.EXHAUSTIVE_ONLY if capability == 90 else calls.EVERY_GENERATION
    return {name: call for name, call in calls.CALLS.items() if name in names}
