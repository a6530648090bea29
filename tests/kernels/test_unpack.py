"""The PTX that unpacks numbers, which Triton's interpreter cannot run, executed here on every byte.

Semantics are those of the PTX ISA for the few instructions that occur; results are compared with plain arithmetic.
"""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from persimmon.kernels import unpack

BYTES = torch.arange(256, dtype=torch.uint8).view(-1, 4)
"""Every byte once, four in a register."""


def run_ptx(code: str, word: int) -> tuple[int, int]:
    """$0 and $1 of a block of assembly whose $2 is given."""
    registers = {"$2": word}

    def value(operand: str) -> int:
        if operand.startswith("0f"):
            return int(operand[2:], 16)
        return registers[operand] if operand in registers else int(operand, 0)

    for statement in code.strip("{}\n").split(";"):
        if not (found := re.match(r"\s*(\w+)\.(\S+)\s+(.*)", statement)) or found[1] == "":
            continue
        name, kind, operands = found[1], found[2], [each.strip() for each in found[3].split(",")]
        registers[operands[0]] = INSTRUCTIONS[name](kind, *map(value, operands[1:]))
    return registers["$0"], registers["$1"]


def _permute(kind: str, a: int, b: int, selector: int) -> int:
    parts = (a | (b << 32)).to_bytes(8, "little")
    assert not selector & 0x8888  # signs are not replicated
    return int.from_bytes(bytes(parts[selector >> 4 * place & 7] for place in range(4)), "little")


def _logic(kind: str, a: int, b: int, c: int, table: int) -> int:
    result = 0
    for bit in range(32):
        index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
        result |= (table >> index & 1) << bit
    return result


def _floats(kind: str, word: int) -> torch.Tensor:
    """The numbers of a register, in float64."""
    bits = torch.from_numpy(np.array([word], dtype=np.uint32)).view(torch.int32)
    dtype = {"f32": torch.float32, "f16x2": torch.float16, "bf16x2": torch.bfloat16}[kind]
    return bits.view(dtype).double()


def _word(kind: str, exact: torch.Tensor) -> int:
    """Numbers in a register; they must not be rounded."""
    dtype = {"f32": torch.float32, "f16x2": torch.float16, "bf16x2": torch.bfloat16}[kind]
    assert torch.equal(exact.to(dtype).double(), exact)
    return int(exact.to(dtype).view(torch.int32).item()) & 0xFFFFFFFF


def _subtract(kind: str, a: int, b: int) -> int:
    return _word(kind, _floats(kind, a) - _floats(kind, b))


def _multiply_add(kind: str, a: int, b: int, c: int) -> int:
    kind = kind.removeprefix("rn.")
    return _word(kind, _floats(kind, a) * _floats(kind, b) + _floats(kind, c))


INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "mov": lambda kind, a: a,
    "xor": lambda kind, a, b: a ^ b,
    "shr": lambda kind, a, b: a >> b,
    "prmt": _permute,
    "lop3": _logic,
    "sub": _subtract,
    "fma": _multiply_add,
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("part", ["BYTES", "LOW", "HIGH"])
def test_every_byte_becomes_its_number(dtype: torch.dtype, part: str) -> None:
    code = getattr(unpack, f"_{'B' if dtype == torch.bfloat16 else ''}FLOAT16_OF_{part}").value
    expected = {
        "BYTES": BYTES.view(torch.int8),
        "LOW": (BYTES << 4).view(torch.int8) >> 4,
        "HIGH": BYTES.view(torch.int8) >> 4,
    }
    for given, numbers in zip(BYTES, expected[part], strict=True):
        words = run_ptx(code, int.from_bytes(bytes(given.tolist()), "little"))
        found = torch.from_numpy(np.array(words, dtype=np.uint32)).view(torch.int32).view(dtype)
        assert torch.equal(found, numbers.to(dtype))
