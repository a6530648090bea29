"""The GPU suite's own code, on a tiny network in Triton's interpreter: what it finds is checked on a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.cli import SECTIONS, TARGETS, _in_own_process, failures, judged, main, run_section
from benchmarks.gpu.compare import check_repeats, check_same, compare, rounded
from benchmarks.gpu.report import Report, ResultFile
from tests.interpreter import multiply_as_matrix_units

ABSENT_ON_A_GPU_MACHINE = ("fastapi", "msgspec", "psutil", "pydantic", "uvicorn", "uvloop", "zmq")


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(ResultFile(tmp_path / "found.json"), "section")


def section_of(report: Report) -> dict:
    report.end()
    return report._section


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--shape", "tiny", *arguments]


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_runs_without_errors_on_the_tiny_network(name: str, tmp_path: Path, monkeypatch) -> None:
    multiply_as_matrix_units(monkeypatch)
    out = tmp_path / "found.json"
    run_section(name, "tiny", "cpu", 0, out)
    section = json.loads(out.read_text())["sections"][name]
    assert failures({name: section}) == []
    assert section["checks"] if name.endswith("checks") else section["rows"]


def test_the_command_leaves_a_file_that_describes_the_run_and_keeps_older_sections(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    for section in ("ceilings", "peer"):
        done = subprocess.run(command("--sections", section, "--out", str(out)), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert set(found["sections"]) == {"ceilings", "peer"}
    assert "times are not figures" in found["description"]["device"]
    assert [target["reached"] for target in found["targets"]] == [None] * len(TARGETS)


def test_the_suite_imports_none_of_the_servers_packages() -> None:
    modules = ["benchmarks.gpu.cli", *(f"benchmarks.gpu.{section.module}" for section in SECTIONS.values())]
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT_ON_A_GPU_MACHINE!r}))\n"
        f"import {', '.join(modules)}; assert not [name for name in sys.modules if name.partition('.')[0] == 'server']"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_section_that_takes_too_long_is_ended_and_written_down(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    _in_own_process("ceilings", "tiny", "cpu", 0, out, limit_s=0.01)
    (error,) = json.loads(out.read_text())["sections"]["ceilings"]["errors"]
    assert "limit" in error["traceback"]


def test_an_error_is_written_down_and_the_section_goes_on(report: Report) -> None:
    with report.attempt("a kernel"):
        torch.empty(3) @ torch.empty(4)
    report.row("table", what="after it", us=1.0)
    section = section_of(report)
    assert "RuntimeError" in section["errors"][0]["traceback"]
    assert section["rows"] == [{"table": "table", "what": "after it", "us": 1.0}]
    assert failures({"section": section}) == ["section: error in a kernel"]


def test_the_8b_shape_is_refused_without_a_gpu(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu"])
    with pytest.raises(SystemExit):
        main()
    assert "--shape tiny" in capsys.readouterr().err


def test_targets_are_reached_from_their_own_side() -> None:
    figures = {target.figure: target.bound for target in TARGETS}
    assert all(target["reached"] for target in judged(figures))
    worse = {target.figure: target.bound * (0.9 if target.at_least else 1.1) for target in TARGETS}
    assert not any(target["reached"] for target in judged(worse))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_rounding_passes_and_cutting_off_does_not(report: Report, dtype: torch.dtype) -> None:
    exact = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 4
    allowed = rounded(exact, dtype, 0.0)
    compare(report, "rounded", exact.to(dtype), exact, allowed)
    compare(report, "a unit off", exact.to(dtype) * (1 + 2 * torch.finfo(dtype).eps), exact, allowed)
    compare(report, "not a number", exact.to(dtype).index_fill(0, torch.tensor([3]), float("nan")), exact, allowed)
    assert [check["passed"] for check in section_of(report)["checks"]] == [True, False, False]


def test_a_single_bit_counts_and_nan_equals_itself(report: Report) -> None:
    one = torch.tensor([1.0, float("nan"), 0.0])
    other = torch.tensor([1.0, float("nan"), -0.0])
    check_same(report, "the same", [one], [one.clone()])
    check_same(report, "signed zero", [one], [other])
    turns = iter([one, one, other])
    check_repeats(report, "a race", lambda: [next(turns)], 2)
    assert [check["passed"] for check in section_of(report)["checks"]] == [True, False, False]
