"""The machine code of every production call, for three generations of GPUs.

`make test` compiles the calls that a server makes most; the others take minutes.
"""

from pathlib import Path

import pytest

from tests.kernels.machine_code.compiled import Matrix, compile_apart
from tests.kernels.machine_code.figures import faults
from tests.kernels.production import CAPABILITIES, MODULES, selected

PLACES = [(c, module, call) for c in CAPABILITIES for module in MODULES for call in selected(module, c, whole=True)]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory, triton_cache: Path) -> Matrix:
    return compile_apart(CAPABILITIES, tmp_path_factory.mktemp("whole") / "matrix.json", triton_cache, whole=True)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("capability", "module", "call"), PLACES)
def test_machine_code_keeps_its_bounds_and_holds_what_its_speed_rests_on(
    matrix: Matrix, capability: int, module: str, call: str
) -> None:
    assert faults(capability, module, call, matrix[capability, module, call]) == []
