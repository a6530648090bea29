"""The GPU suite's own code, on a tiny network in Triton's interpreter: what it finds is checked on a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.cli import failures, main
from benchmarks.gpu.compare import check_repeats, check_same, compare, rounded
from benchmarks.gpu.engine_bench import TIE, EngineBench
from benchmarks.gpu.engine_variants import MODES
from benchmarks.gpu.report import Report, ResultFile
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.suite import SUITES, Setting
from benchmarks.gpu.targets import TARGETS
from tests.benchmarks.gpu_sections import SLOW, run_compiled_ahead
from tests.interpreter import multiply_as_matrix_units

ABSENT_ON_A_GPU_MACHINE = ("fastapi", "msgspec", "psutil", "pydantic", "uvicorn", "uvloop", "zmq")


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(ResultFile(tmp_path / "found.json"), "section")


def section_of(report: Report) -> dict:
    report.end()
    return report._section


@pytest.mark.parametrize("name", [name for name in SECTIONS if name not in SLOW])
def test_every_section_runs_on_the_tiny_network_with_kernels_that_were_compiled_ahead(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiply_as_matrix_units(monkeypatch)
    run_compiled_ahead(name, tmp_path)


def test_a_wrong_token_of_the_engine_is_no_tie() -> None:
    bench = EngineBench(Setting(SUITES["tiny"], torch.device("cpu"), 0), MODES[0])
    logits = bench.logits(0, [])
    best, second = logits.topk(2).indices.tolist()
    worst = int(logits.argmin())
    assert not bench.is_tie(0, [best], [worst])
    assert bench.is_tie(0, [best], [second]) == bool(logits[best] - logits[second] <= TIE * logits.std())


def test_the_command_leaves_a_file_that_describes_the_run_and_prints_the_targets_last(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    out.write_text('{"description": {}, "sections": {"steps": {}}}')
    options = ("--device", "cpu", "--shape", "tiny", "--sections", "ceilings", "--out", str(out))
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert set(found["sections"]) == {"ceilings"}
    assert "times are not figures" in found["description"]["device"]
    assert [target["outcome"] for target in found["targets"]] == ["not measured"] * len(TARGETS)
    assert done.stdout.splitlines()[-1] == str(out)
    assert TARGETS[-1].figure in done.stdout.splitlines()[-2]


def test_the_suite_imports_none_of_the_servers_packages() -> None:
    modules = ["benchmarks.gpu.cli", *(section.module for section in SECTIONS.values())]
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT_ON_A_GPU_MACHINE!r}))\n"
        f"import {', '.join(modules)}; assert 'persimmon.server' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_error_is_written_down_and_the_section_goes_on(report: Report) -> None:
    assert report.attempt("a kernel", lambda: torch.empty(3) @ torch.empty(4)) is None
    report.row("table", what="after it", us=1.0)
    section = section_of(report)
    assert "RuntimeError" in section["errors"][0]["traceback"]
    assert section["rows"] == [{"table": "table", "what": "after it", "us": 1.0}]
    assert failures({"section": section}) == ["section: error in a kernel"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--device", "cpu"], "--shape tiny"),
        (["--budget", "5"], "at least 12"),
        (["--budget", "nan"], "at least 12"),
        (["--sections", "smoke,smok"], "unknown: smok; choose from"),
        (["--out", __file__], "is not JSON"),
    ],
)
def test_options_that_make_no_run_are_refused_with_the_reason(options: list[str], reason: str, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", *options])
    with pytest.raises(SystemExit):
        main()
    assert reason in capsys.readouterr().err


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
