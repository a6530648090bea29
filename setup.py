"""Compiles the C kernels of kernels/cpu, once for each generation of processors; all else is in pyproject.toml.

Where there is no C compiler, or one that does not know a generation, the project installs without: plain torch then
computes in their place, slower.
"""

import platform

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# The names are those of kernels/cpu/library.py, which picks one when the server starts.
FLAGS = {
    "avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"],
    "avx512_vnni": ["-march=x86-64-v4", "-mavx512vnni"],
    "avx512": ["-march=x86-64-v4"],
    "avx_vnni": ["-march=x86-64-v3", "-mavxvnni"],
    "avx2": ["-march=x86-64-v3"],
}

HEADERS = (
    "attention",
    "attention_int8",
    "head",
    "integers",
    "linear",
    "listed",
    "network",
    "norm",
    "packing",
    "quantized",
    "rounding",
    "sampling",
    "team",
    "tiles",
    "vectors",
    "weight_rounding",
)
SHARED = ["setup.py", "kernels/cpu/network.c", *(f"kernels/cpu/{name}.h" for name in HEADERS)]


class BuildExtensions(build_ext):
    """Compiles the extensions side by side, and for an editable installation only those whose sources have changed.

    Each editable installation has a temporary build folder of its own, so it would compile everything again.  `make`
    has several of them, one for each set of extras.
    """

    def finalize_options(self) -> None:
        """Sets what is not given otherwise."""
        if self.editable_mode:
            self.build_lib = "build/editable"
        if self.parallel is None:
            self.parallel = True
        super().finalize_options()


def _extension(build: str, flags: list[str]) -> Extension:
    return Extension(
        f"persimmon.kernels.cpu._{build}",
        sources=[f"kernels/cpu/{build}.c"],
        depends=SHARED,
        extra_compile_args=["-std=c11", "-O3", "-pthread", *flags],
        optional=True,
    )


is_x86 = platform.machine().lower() in ("x86_64", "amd64")
setup(
    cmdclass={"build_ext": BuildExtensions},
    ext_modules=[_extension(build, flags) for build, flags in FLAGS.items()] if is_x86 else [],
)
