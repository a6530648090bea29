"""Compiles what the kernels' own wrappers would launch, for a GPU that need not be there, and reads the machine code.

`compile_calls` runs wrappers on meta tensors with every launch replaced by a compilation, so the code is specialised
as in a real call: same constants, same divisibility of pointers and sizes.  Needs a process of its own, with
TRITON_INTERPRET=0, because it leaves Triton believing in that GPU.  As a program it prints what it found:

    TRITON_INTERPRET=0 python -m tests.kernels.ahead_of_time 80 90 100 [--whole] [--json FILE]
"""

import argparse
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import TypeVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.kernels.machine_code.compiled import Compiled
from tests.kernels.production import MODULES, selected

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION_BYTES = 16

Call = TypeVar("Call", bound=Hashable)


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
def launches_compile(capability: int) -> Iterator[dict]:
    """Every launch compiles; yields what was compiled, in order, with the programs of its first launch."""
    compiled: dict = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.setdefault(kernel, prod(grid))
        return kernel

    driver.set_active(_Target(capability))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


def compile_calls(calls: Mapping[Call, Callable[[], None]], capability: int) -> dict[Call, list[Compiled]]:
    """Every different kernel that each of the calls launches, compiled for sm_{capability} instead."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("Triton interprets kernels in this process: set TRITON_INTERPRET=0 before it starts")
    launched = {}
    for name, call in calls.items():
        with launches_compile(capability) as kernels:
            call()
        launched[name] = kernels
    different = list(dict.fromkeys(kernel for kernels in launched.values() for kernel in kernels))
    code = dict(zip(different, zip(_disassemble(different), _resources(different), strict=True), strict=True))
    return {
        name: [_read(kernel, programs, *code[kernel]) for kernel, programs in kernels.items()]
        for name, kernels in launched.items()
    }


def _read(kernel, programs: int, sass: str, used: Mapping[str, str]) -> Compiled:
    return Compiled(
        kernel=kernel.name,
        registers=int(used["REG"]),
        stack=int(used["STACK"]),
        shared_bytes=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        programs=programs,
        ttgir=kernel.asm["ttgir"],
        ptx=kernel.asm["ptx"],
        sass=sass,
    )


def _resources(kernels: Sequence) -> Iterator[dict[str, str]]:
    """Registers and stack of each, as the assembler allotted them."""
    for kernel in kernels:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            Path(cubin.name).write_bytes(kernel.asm["cubin"])
            yield dict(re.findall(r"(REG|STACK):(\d+)", _tool("cuobjdump", "-res-usage", cubin.name)))


def _disassemble(kernels: Sequence) -> Iterator[str]:
    """One after the other in one run, because the disassembler starts ten times as long as it reads a kernel.

    Jumps therefore name addresses in all of the code.
    """
    codes = [_instructions(kernel.asm["cubin"]) for kernel in kernels]
    (target,) = {match[1] for kernel in kernels if (match := re.search(r"\.target sm_(\w+)", kernel.asm["ptx"]))}
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(b"".join(codes))
        text = _tool("nvdisasm", "--binary", f"SM{target}", file.name)
    lines = re.findall(r"^ *(/\*[0-9a-f]+\*/.*)$", text, re.MULTILINE)
    counts = [len(code) // INSTRUCTION_BYTES for code in codes]
    if len(lines) != sum(counts) or not all(counts):
        raise RuntimeError(f"nvdisasm read {len(lines)} instructions in kernels that should have {counts}")
    for end, count in zip(accumulate(counts), counts, strict=True):
        yield "\n".join(lines[end - count : end])


def _instructions(cubin: bytes) -> bytes:
    """The executable sections of an ELF file (elf(5): Elf64_Ehdr, Elf64_Shdr, SHF_EXECINSTR)."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    entry, count = struct.unpack_from("<HH", cubin, 58)
    sections = (struct.unpack_from("<IIQQQQ", cubin, table + index * entry) for index in range(count))
    return b"".join(cubin[offset : offset + size] for _, _, flags, _, offset, size in sections if flags & 4)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("capabilities", nargs="+", type=int)
    parser.add_argument("--whole", action="store_true", help="all calls, not only those that `make test` compiles")
    parser.add_argument("--json", type=Path, help="write everything here, machine code included")
    arguments = parser.parse_args()
    found = []
    for capability in arguments.capabilities:
        wanted = {
            (module, call): launch
            for module in MODULES
            for call, launch in selected(module, capability, whole=arguments.whole).items()
        }
        for (module, call), kernels in compile_calls(wanted, capability).items():
            for compiled in kernels:
                found.append({"capability": capability, "module": module, "call": call, **asdict(compiled)})
                print(
                    f"sm_{capability} {call}: {compiled.kernel} registers {compiled.registers} "
                    f"stack {compiled.stack} shared {compiled.shared_bytes} warps {compiled.num_warps}",
                    file=sys.stderr,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
