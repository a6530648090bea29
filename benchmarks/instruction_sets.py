"""Restricts measured servers to fewer instruction sets than this processor has, so that one machine stands for several.

This server gets a view of the checkout with one build of the C kernels, and all get CPUID instructions that hide
what is above the level (cpuid_mask.c).  Knows no server.
"""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from persimmon.kernels.cpu import library

ROOT = Path(__file__).parents[1]
MASK_SOURCE = Path(__file__).parent / "cpuid_mask.c"


@dataclass(frozen=True)
class InstructionSet:
    """What a program may use.

    Attributes:
        name: for tables and reports.
        mask: the level of cpuid_mask.c; None hides nothing.
        builds: of the C kernels, those that use nothing above the level.
    """

    name: str
    mask: str | None
    builds: frozenset[str]

    @property
    def build(self) -> str:
        """The fastest build within the level that this processor runs.

        Raises:
            LookupError: none is compiled, or this processor runs none.
        """
        for build in library.builds():
            if build in self.builds:
                return build
        raise LookupError(f"no build of the C kernels for {self.name} runs here; there are {library.builds()}")


_AMX = frozenset(build for build, needed in library.BUILDS.items() if any("amx" in flag for flag in needed))
_AVX512 = frozenset(build for build, needed in library.BUILDS.items() if any("avx512" in flag for flag in needed))
_AVX2 = frozenset(build for build, needed in library.BUILDS.items() if needed <= {"avx2", "fma", "f16c", "bmi2"})

INSTRUCTION_SETS: Mapping[str, InstructionSet] = {
    "native": InstructionSet("native", None, frozenset(library.BUILDS)),
    "avx512": InstructionSet("avx512", "avx512", (_AVX512 | _AVX2) - _AMX),
    "avx2": InstructionSet("avx2", "avx2", _AVX2),
}
"""native: all that the processor has; avx512: without AMX; avx2: without AVX-512 and AVX-VNNI."""


def masked_environment(level: InstructionSet, folder: Path) -> dict[str, str]:
    """The variables with which another program sees a processor of this level.

    Args:
        level: what it may use.
        folder: an existing one, for the compiled library.

    Raises:
        subprocess.CalledProcessError: the library cannot be compiled.
    """
    if level.mask is None:
        return {}
    compiled = folder / "cpuid_mask.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(compiled), str(MASK_SOURCE)], check=True)
    return {"LD_PRELOAD": str(compiled), "PERSIMMON_MASK_CPUID": level.mask}


def view_of_checkout(folder: Path, build: str) -> Path:
    """Makes a folder from which Python imports this checkout's `persimmon` with a single build of the C kernels.

    Everything else is a link to the checkout.

    Args:
        folder: to make; its parent exists.
        build: one of `library.builds()`.

    Returns:
        `folder`, to be put first into PYTHONPATH.
    """
    package = folder / "persimmon"
    kept = library.library_path(build).name
    _link_all(ROOT / "persimmon", package, without={"kernels"})
    _link_all(ROOT / "kernels", package / "kernels", without={"cpu"})
    others = {path.name for path in (ROOT / "kernels" / "cpu").glob("*.so")} - {kept}
    _link_all(ROOT / "kernels" / "cpu", package / "kernels" / "cpu", without=others)
    return folder


def _link_all(source: Path, folder: Path, without: set[str]) -> None:
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.name not in without | {"__pycache__"}:
            (folder / path.name).symlink_to(path.resolve())
