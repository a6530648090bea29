import os
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.instruction_sets import INSTRUCTION_SETS, masked_environment, view_of_checkout
from persimmon.kernels.cpu import library

SHOW = """
#include <stdio.h>
int main(void) {
    __builtin_cpu_init();
    printf("%d %d\\n", __builtin_cpu_supports("avx2") != 0, __builtin_cpu_supports("avx512f") != 0);
}
"""


@pytest.mark.skipif("cpuid_fault" not in library.processor_flags(), reason="CPUID cannot be made to fault here")
@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_a_masked_program_sees_only_the_instructions_of_its_level(tmp_path: Path, level: str) -> None:
    (tmp_path / "show.c").write_text(SHOW)
    subprocess.run(["cc", "-o", tmp_path / "show", tmp_path / "show.c"], check=True)

    def seen(environment: dict[str, str]) -> str:
        command = [tmp_path / "show"]
        return subprocess.run(
            command, env={**os.environ, **environment}, check=True, capture_output=True, text=True
        ).stdout

    avx2, avx512 = seen({}).split()
    masked = seen(masked_environment(INSTRUCTION_SETS[level], tmp_path)).split()
    assert masked == [avx2, avx512 if level == "avx512" else "0"]


def test_nothing_is_masked_natively(tmp_path: Path) -> None:
    assert masked_environment(INSTRUCTION_SETS["native"], tmp_path) == {}


@pytest.mark.skipif(not library.builds(), reason="no build of the C kernels for this processor")
def test_a_view_has_one_build_and_otherwise_this_checkout(tmp_path: Path) -> None:
    build = library.builds()[-1]
    package = view_of_checkout(tmp_path / "view", build) / "persimmon"
    native = package / "kernels" / "cpu"
    assert [path.name for path in native.glob("*.so")] == [library.library_path(build).name]
    assert (native / "library.py").samefile(library.__file__)
    assert (package / "server" / "cli.py").exists()


def test_avx2_keeps_builds_with_wider_or_integer_instructions_out() -> None:
    assert all(library.BUILDS[build] <= {"avx2", "fma", "f16c", "bmi2"} for build in INSTRUCTION_SETS["avx2"].builds)
    assert "avx2" in INSTRUCTION_SETS["avx2"].builds
    assert "avx512" in INSTRUCTION_SETS["avx512"].builds
