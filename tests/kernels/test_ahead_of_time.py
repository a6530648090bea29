"""The kernels' machine code for three generations of GPUs, which need not be there.

tests/compat/test_machine_code.py reads the whole matrix.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernels.machine_code.compiled import Matrix, compile_apart
from tests.kernels.machine_code.figures import bounds, faults
from tests.kernels.production import CAPABILITIES, MODULES, calls_of, selected

PLACES = [(c, module, call) for c in CAPABILITIES for module in MODULES for call in selected(module, c, whole=False)]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory, triton_cache: Path) -> Matrix:
    return compile_apart(CAPABILITIES, tmp_path_factory.mktemp("ahead-of-time") / "matrix.json", triton_cache)


@pytest.mark.parametrize(("capability", "module", "call"), PLACES)
def test_machine_code_keeps_its_bounds_and_holds_what_its_speed_rests_on(
    matrix: Matrix, capability: int, module: str, call: str
) -> None:
    assert faults(capability, module, call, matrix[capability, module, call]) == []


def test_a_bound_that_is_missed_is_a_fault(matrix: Matrix) -> None:
    place = 90, "projection", "query_key_value_fp16_16"
    [kernel] = matrix[place]
    limits = bounds(*place, kernel.kernel)
    assert limits is not None
    over = replace(
        kernel,
        registers=limits.registers + 1,
        stack=8,
        shared_bytes=limits.shared_bytes + 1,
        sass="LDG.E.U16 R2, [R4.64] ;",
    )
    assert faults(*place, [over]) == [
        "projection_kernel spills 8 bytes",
        f"projection_kernel takes {over.registers} registers, more than {limits.registers}",
        f"projection_kernel takes {over.shared_bytes} bytes of shared memory, more than {limits.shared_bytes}",
        "projection_kernel loads a tensor of 16-bit numbers one by one",
        *(f"no instruction is {pattern}" for pattern in calls_of("projection").EXPECTED[place[2]]),
    ]
    assert faults(*place, [replace(kernel, kernel="another")]) == [
        "none of another has a bound in persimmon.kernels.projection.LIMITS"
    ]
