"""The GPU suite's long sections, with kernels that compute: no comparison may fail where nothing is wrong.

Here because Triton's interpreter takes a minute for them.
"""

from pathlib import Path

import pytest

from tests.benchmarks.gpu_sections import SLOW, run_compiled_ahead
from tests.benchmarks.simulated_gpu import run_section
from tests.interpreter import multiply_as_matrix_units


@pytest.mark.parametrize("name", ["smoke", "checks", "engine", "guesses"])
def test_what_a_section_compares_on_a_simulated_gpu_is_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiply_as_matrix_units(monkeypatch)
    section = run_section(name, tmp_path)
    assert section["errors"] == []
    assert [check["name"] for check in section["checks"] if not check["passed"]] == []


@pytest.mark.parametrize("name", SLOW)
def test_a_long_section_runs_with_kernels_that_were_compiled_ahead(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiply_as_matrix_units(monkeypatch)
    run_compiled_ahead(name, tmp_path)
