"""The GPU suite's comparisons on a simulated GPU, with kernels that compute: none may fail where nothing is wrong.

Here because Triton's interpreter takes a minute for them.
"""

from pathlib import Path

import pytest

from tests.benchmarks.simulated_gpu import run_section
from tests.interpreter import multiply_as_matrix_units


@pytest.mark.parametrize("name", ["smoke", "checks", "engine"])
def test_what_a_section_compares_is_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_as_matrix_units(monkeypatch)
    section = run_section(name, tmp_path)
    assert section["errors"] == []
    assert [check["name"] for check in section["checks"] if not check["passed"]] == []
