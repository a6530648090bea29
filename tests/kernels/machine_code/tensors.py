"""Which tensor an instruction of PTX reads or writes.

Triton keeps the order of a kernel's arguments, whose names are in its TTGIR; an address is followed back to the
arguments that it was computed from.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property

from tests.kernels.machine_code.instructions import Code

_ARGUMENT = re.compile(r"%(\w+): (?:!tt\.ptr<|[if]\d)")
_REGISTER = re.compile(r"%r[sd]?\d+")
_ADDRESS = re.compile(r"\[\s*(%rd\d+)[^\]]*\]")
_PARAMETER = re.compile(r"ld\.param\S*\s+(%rd\d+), \[\w+_param_(\d+)\]")
# What is computed from what was read from memory is an offset.
_WRITES_NO_REGISTER = re.compile(r"(?:st|red|bar|bra|ret|cp|fence|prefetch|wgmma|griddepcontrol)\b")
_READS_MEMORY = re.compile(r"(?:ld|atom)\.")


def argument_names(ttgir: str) -> list[str]:
    """Of a kernel's arguments, constants left out."""
    begin = ttgir.index("tt.func public @")
    return _ARGUMENT.findall(ttgir[begin : ttgir.index("attributes {noinline", begin)])


class Tensors:
    """Tensors behind the addresses of a kernel's PTX."""

    def __init__(self, code: Code, names: Sequence[str]) -> None:
        self._code = code
        self._names = names

    def at(self, place: int) -> set[str]:
        """Names of the arguments that the address in global memory of an instruction is computed from."""
        addresses = _ADDRESS.findall(self._code.instructions[place].text)
        return self._behind(addresses[-1]) if addresses else set()

    @cached_property
    def _sources(self) -> dict[str, set[str]]:
        """What each register is computed from: registers, and "#2" for the third argument."""
        sources: dict[str, set[str]] = defaultdict(set)
        for instruction in self._code.instructions:
            if parameter := _PARAMETER.match(instruction.text):
                sources[parameter[1]].add(f"#{parameter[2]}")
            elif not _READS_MEMORY.match(instruction.text) and not _WRITES_NO_REGISTER.match(instruction.text):
                first, _, others = instruction.text.partition("}," if "{" in instruction.text.split(",")[0] else ",")
                for written in _REGISTER.findall(first):
                    sources[written].update(_REGISTER.findall(others))
        return sources

    def _behind(self, register: str) -> set[str]:
        seen: set[str] = set()
        ahead = [register]
        while ahead:
            if (each := ahead.pop()) not in seen:
                seen.add(each)
                ahead += self._sources.get(each, ())
        return {
            self._names[int(each[1:])] for each in seen if each.startswith("#") and int(each[1:]) < len(self._names)
        }
