"""The machine code of every production call: of the pinned Triton for three generations of GPUs, of the oldest and the
newest release for sm_90.

`make test` compiles the calls that a server makes most; of these matrices the first takes about ten minutes of CPU, and
each other three to five.
"""

import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from persimmon.kernels.launch import MIN_TRITON
from tests.kernels.machine_code import latency, lint
from tests.kernels.machine_code.compiled import REPOSITORY, Matrix, compile_apart
from tests.kernels.machine_code.figures import faults
from tests.kernels.production import CAPABILITIES, MODULES, selected

pytestmark = pytest.mark.timeout(1800)
PLACES = [(c, module, call) for c in CAPABILITIES for module in MODULES for call in selected(module, c, whole=True)]


def oldest() -> str:
    """The oldest Triton that pyproject.toml allows."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (triton,) = (each for each in map(Requirement, project["optional-dependencies"]["dev"]) if each.name == "triton")
    (lower,) = triton.specifier
    return f"triton=={lower.version}.0"


@dataclass(frozen=True)
class Release:
    """What a release of Triton made of all calls."""

    version: Version
    matrix: Matrix


@pytest.fixture(scope="module")
def pinned(tmp_path_factory: pytest.TempPathFactory, triton_cache: Path) -> Matrix:
    return compile_apart(CAPABILITIES, tmp_path_factory.mktemp("pinned") / "matrix.json", triton_cache, whole=True)


@pytest.fixture(scope="module", params=[oldest(), "triton"], ids=["oldest", "newest"])
def release(request, tmp_path_factory: pytest.TempPathFactory, triton_cache: Path) -> Release:
    """A release in a folder of its own, in front of the tests' packages; torch is the same for all."""
    packages = tmp_path_factory.mktemp("packages")
    install = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), request.param)
    subprocess.run(install, check=True)
    used = subprocess.run(
        (sys.executable, "-c", "import triton; print(triton.__file__, triton.__version__)"),
        env=os.environ | {"PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        check=True,
    )
    file, version = used.stdout.split()
    assert Path(file).is_relative_to(packages)
    matrix = compile_apart([90], packages / "matrix.json", triton_cache, whole=True, packages=packages)
    return Release(Version(version), matrix)


@pytest.mark.parametrize(("capability", "module", "call"), PLACES)
def test_machine_code_keeps_its_bounds_and_holds_what_its_speed_rests_on(
    pinned: Matrix, capability: int, module: str, call: str
) -> None:
    assert faults(capability, module, call, pinned[capability, module, call]) == []


@pytest.mark.parametrize("rule", lint.RULES)
def test_machine_code_keeps_the_rule(pinned: Matrix, rule: str) -> None:
    assert lint.violations(pinned, rule) == {}


@pytest.mark.parametrize("rule", lint.RULES)
def test_machine_code_of_a_release_keeps_the_rule(release: Release, rule: str) -> None:
    found = lint.violations(release.matrix, rule)
    if rule == "proxy_fence" and release.version < Version(MIN_TRITON):
        # Why the server refuses it on sm_90: not one kernel, but nearly all that multiply.
        assert {place.split(",")[0] for place in found} == {
            f"sm_90 {module}"
            for module in (
                *("prefill_attention", "projection", "head"),
                *("invariant_attention", "invariant_projection", "packed_projection"),
            )
        }
    else:
        assert found == {}


def test_statistics_are_summed_in_one_order_by_a_release(release: Release) -> None:
    assert lint.reduction_layouts(release.matrix) == []


def test_a_release_has_enough_bytes_of_a_weight_in_flight(release: Release) -> None:
    few = {
        f"{projection}, {rows} rows": latency.bytes_in_flight(kernel)
        for projection, rows in latency.PROJECTIONS
        if latency.bytes_in_flight(kernel := latency.projection_kernel(release.matrix, projection, rows))
        < latency.MIN_BYTES_IN_FLIGHT
    }
    assert few == {}
