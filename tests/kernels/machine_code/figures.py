"""Registers, spills, shared memory and widths of loads of a call's kernels, against the bounds next to the kernels."""

import importlib
import re
from collections.abc import Sequence

from persimmon.kernels.launch import Limits
from tests.kernels.machine_code.compiled import Compiled
from tests.kernels.production import calls_of

SCALAR_16_BIT_LOAD = re.compile(r"LDG\.E\.U16(\.CONSTANT)? ")


def bounds(capability: int, module: str, call: str, kernel: str) -> Limits | None:
    """The most specific ones written next to the kernel; None if the kernel belongs to another module."""
    table: dict[str, Limits] = importlib.import_module(f"persimmon.kernels.{module}").LIMITS
    kind = getattr(calls_of(module), "KINDS", {}).get(call)
    names = [f"{kernel}, {kind}", kernel] if kind else [kernel]
    keys = [key for name in names for key in (f"{name}, sm_{capability}", name)]
    return next((table[key] for key in keys if key in table), None)


def faults(capability: int, module: str, call: str, kernels: Sequence[Compiled]) -> list[str]:
    """What is wrong with the kernels of a call: one line each."""
    found = []
    limits = {kernel.kernel: bounds(capability, module, call, kernel.kernel) for kernel in kernels}
    if not any(limits.values()):
        found.append(f"none of {', '.join(limits)} has a bound in persimmon.kernels.{module}.LIMITS")
    for kernel in kernels:
        name = kernel.kernel
        if kernel.stack:
            found.append(f"{name} spills {kernel.stack} bytes")
        if (limit := limits[name]) is not None and kernel.registers > limit.registers:
            found.append(f"{name} takes {kernel.registers} registers, more than {limit.registers}")
        if limit is not None and kernel.shared_bytes > limit.shared_bytes:
            found.append(f"{name} takes {kernel.shared_bytes} bytes of shared memory, more than {limit.shared_bytes}")
        if SCALAR_16_BIT_LOAD.search(kernel.sass) and call not in getattr(calls_of(module), "SCALARS", ()):
            found.append(f"{name} loads a tensor of 16-bit numbers one by one")
    if capability == 90:
        machine_code = "\n".join(kernel.sass for kernel in kernels)
        expected = calls_of(module).EXPECTED.get(call, ())
        found += [f"no instruction is {pattern}" for pattern in expected if not re.search(pattern, machine_code)]
    return found
