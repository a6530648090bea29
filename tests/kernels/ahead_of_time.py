"""Compiles what the kernels' own wrappers would launch, for a GPU that need not be there, and reads the machine code.

`compile_calls` runs a wrapper on meta tensors with every launch replaced by a compilation, so the code is specialised
as in a real call: same constants, same divisibility of pointers and sizes.  Needs a process of its own, with
TRITON_INTERPRET=0, because it leaves Triton believing in that GPU.  As a program it prints what it found:

    TRITON_INTERPRET=0 python -m tests.kernels.ahead_of_time tests.kernels.production_calls_NAME... --capability 90
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel as it would be launched."""

    kernel: str
    registers: int
    stack: int
    shared_bytes: int
    num_warps: int
    sass: str
    ptx: str


class _Target:
    """Stands where Triton expects a GPU's driver."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        # Triton keeps what it has compiled by device.
        return self._target.arch

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")


@contextmanager
def launches_compile(capability: int) -> Iterator[list]:
    compiled: list = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel not in compiled:
            compiled.append(kernel)
        return kernel

    driver.set_active(_Target(capability))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


def compile_calls(call: Callable[[], None], capability: int) -> list[Compiled]:
    """Every different kernel that `call` launches, compiled for sm_{capability} instead."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("Triton interprets kernels in this process: set TRITON_INTERPRET=0 before it starts")
    with launches_compile(capability) as kernels:
        call()
    return [_read(kernel) for kernel in kernels]


def _read(kernel) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", cubin)
        sass = _tool("cuobjdump", "-sass", cubin)
    used = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    return Compiled(
        kernel.name,
        int(used["REG"]),
        int(used["STACK"]),
        kernel.metadata.shared,
        kernel.metadata.num_warps,
        sass,
        kernel.asm["ptx"],
    )


def _tool(name: str, *arguments) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("modules", nargs="+")
    parser.add_argument("--capability", type=int, required=True)
    parser.add_argument("--json", type=Path, help="write everything here, machine code included")
    arguments = parser.parse_args()
    found = []
    for module in arguments.modules:
        for call, run in importlib.import_module(module).CALLS.items():
            for compiled in compile_calls(run, arguments.capability):
                found.append({"module": module, "call": call, **asdict(compiled)})
                print(
                    f"sm_{arguments.capability} {call}: {compiled.kernel} registers {compiled.registers} "
                    f"stack {compiled.stack} shared {compiled.shared_bytes} warps {compiled.num_warps}",
                    file=sys.stderr,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
