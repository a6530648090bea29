"""The GPU suite's command on a simulated GPU: graphs, events, dependent launch and the profiler run only there."""

import json
import os
import sys
from typing import Any

import pytest

from benchmarks.gpu import cli, compile_jobs, supervisor, targets
from benchmarks.gpu.sections import SECTIONS
from tests.benchmarks import simulated_gpu


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command has written after all sections, without the numbers that kernels would have computed."""
    folder = tmp_path_factory.mktemp("suite")
    tool, out = folder / "nvidia-smi", folder / "found.json"
    tool.write_text(simulated_gpu.NVIDIA_SMI)
    tool.chmod(0o700)
    options = ["--shape", "tiny", "--budget", "3600", "--sections", ",".join(SECTIONS), "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        patch.setattr(supervisor, "work", simulated_gpu.work)
        # What compiles is another test's.
        patch.setattr(compile_jobs, "jobs_of", lambda shape, name: [])
        patch.setattr(sys, "argv", ["gpu", *options])
        cli.main()
    content: dict[str, Any] = json.loads(out.read_text())
    return content


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_runs_to_its_end(found: dict[str, Any], name: str) -> None:
    section = found["sections"][name]
    assert [error["traceback"] for error in section["errors"]] == []
    assert not section.get("left_out")
    assert section["checks"] or section["rows"] or name == "types"


def test_the_file_names_the_card_and_judges_by_its_targets(found: dict[str, Any]) -> None:
    assert found["description"]["device"] == "NVIDIA H200"
    outcomes = {target["figure"]: target["outcome"] for target in found["targets"]}
    assert outcomes[targets.COPY_OF_NOMINAL] != "not measured"
