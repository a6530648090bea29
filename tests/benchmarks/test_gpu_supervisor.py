"""What the GPU suite does about parts that fail, hang, kill their process or have no time left."""

import importlib
import json
import math
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from benchmarks.gpu.cli import Options, failures, run
from benchmarks.gpu.report import DEVICE_LOST, PreparationError, Report, ResultFile, Terms
from benchmarks.gpu.sections import BUDGET_S, RESERVE_S, SECTIONS, START_S, Section, section_end
from benchmarks.gpu.supervisor import run_sections
from benchmarks.gpu.targets import COPY, DENSE_1, PREDICTED, TARGETS, judged, nominal_bytes, table
from benchmarks.gpu.worker import Job
from tests.benchmarks.planted_gpu_section import ONLY_HANGS

PLANTED = Section("tests.benchmarks.planted_gpu_section", 10)


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Forked processes then have what takes long to import."""
    for module in ("tests.interpreter", SECTIONS["types"].module):
        importlib.import_module(module)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    # Forked processes start at once; these sections compute nothing.
    return Job(
        {"planted": PLANTED, "types": SECTIONS["types"]}, "tiny", "cpu", 0, tmp_path / "found.json", start_method="fork"
    )


def test_a_run_goes_on_behind_what_kills_or_hangs_its_process(job: Job) -> None:
    run_sections(replace(job, limit_s=1.0))
    sections = json.loads(job.out.read_text())["sections"]
    planted = sections["planted"]
    assert [row["what"] for row in planted["rows"]] == ["first", "between", "last"]
    errors = {error["in"]: error for error in planted["errors"]}
    assert list(errors) == ["raises", "crashes", "hangs"]
    assert "plain error" in errors["raises"]["traceback"]
    assert "with launches blocking" not in errors["raises"]
    assert "-9" in errors["crashes"]["traceback"]
    assert "-9" in errors["crashes"]["with launches blocking"]
    assert "in hangs" in errors["hangs"]["traceback"]  # the stack of what hung
    assert errors["hangs"]["with launches blocking"] == "no error"
    assert "seconds" in sections["types"]
    assert "CUDA_LAUNCH_BLOCKING" not in os.environ


def test_what_is_under_way_when_the_time_is_over_is_left_out_and_is_no_error(job: Job) -> None:
    run_sections(replace(job, sections={"planted": PLANTED}, seed=ONLY_HANGS, ends_at=time.monotonic() + 4))
    sections = json.loads(job.out.read_text())["sections"]
    assert sections["planted"]["left_out"] == ["hangs"]
    assert failures(sections) == []


def test_a_device_that_answers_with_errors_ends_its_process_and_the_error_belongs_to_its_attempt(
    tmp_path: Path, monkeypatch
) -> None:
    class LeftError(Exception):
        pass

    def leave(code: int) -> None:
        raise LeftError(code)

    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr("os._exit", leave)
    report = Report(ResultFile(tmp_path / "found.json"), "section", Terms(synchronize=lost))
    with pytest.raises(LeftError, match=str(DEVICE_LOST)):
        report.attempt("launched and forgotten", lambda: None)
    section = ResultFile(tmp_path / "found.json").section("section")
    assert section["under_way"] == "launched and forgotten"
    assert "illegal memory access" in section["errors"][0]["traceback"]


def test_nothing_starts_that_does_not_fit(tmp_path: Path) -> None:
    report = Report(ResultFile(tmp_path / "found.json"), "section", Terms(ends_at=time.monotonic() + 30))
    assert report.attempt("short", lambda: "ran", seconds=1) == "ran"
    assert report.attempt("long", lambda: "ran", seconds=60) is None
    assert report._section["left_out"] == ["long"]
    late = Report(ResultFile(tmp_path / "found.json"), "late", Terms(ends_at=time.monotonic()))
    with pytest.raises(PreparationError):
        late.prepare("inputs", lambda: "made")


def test_a_process_that_continues_prepares_again_and_repeats_nothing_else(tmp_path: Path) -> None:
    file = ResultFile(tmp_path / "found.json")
    calls: list[str] = []

    def call(name: str) -> str:
        calls.append(name)
        return name

    for _ in range(2):
        report = Report(file, "section")
        report.prepare("inputs", partial(call, "inputs"))
        report.attempt("part", partial(call, "part"))
    assert calls == ["inputs", "part", "inputs"]


def test_sections_share_the_budget_and_pass_on_what_they_leave() -> None:
    sections = [section for section in SECTIONS.values() if section.is_default]
    end, now = BUDGET_S - RESERVE_S, START_S
    assert sum(section.share for section in sections) <= end - now
    for index, section in enumerate(sections):
        stops = section_end(section, sections[index + 1 :], now, end)
        assert now + min(section.limit_s, section.share) <= stops + 1e-9 <= end + 2e-9
        now = (now + stops) / 2  # each takes half of what it may
    assert section_end(sections[0], sections[1:], 5.0, 4.0) == 5.0


def test_the_first_minute_holds_a_start_the_ceilings_and_the_smoke() -> None:
    assert START_S + SECTIONS["ceilings"].limit_s + SECTIONS["smoke"].limit_s <= 60
    assert list(SECTIONS)[:2] == ["ceilings", "smoke"]


def test_sections_that_are_not_asked_for_stay_if_the_machine_is_the_same(tmp_path: Path) -> None:
    out, described = tmp_path / "found.json", {"device": "cpu", "torch": "1"}
    older = {"steps": {"checks": [], "errors": [], "rows": [], "figures": {"x": 1.0}}}
    options = Options(sections=["types"], device="cpu", shape="tiny", seed=0, budget_s=math.inf, out=out)
    for before, stays in ((described, True), ({"device": "another"}, False)):
        out.write_text(json.dumps({"description": before, "sections": older}))
        assert run(options, described, "fork")
        assert ("steps" in json.loads(out.read_text())["sections"]) == stays


def test_targets_are_met_from_their_own_side_and_shown_with_what_was_measured() -> None:
    figures = {target.figure: target.bound for target in TARGETS}
    assert {own["outcome"] for own in judged(figures, {})} == {"met"}
    worse = {target.figure: target.bound * (0.9 if target.at_least else 1.1) for target in TARGETS}
    assert {own["outcome"] for own in judged(worse, {})} == {"missed"}
    assert {own["outcome"] for own in judged({}, {})} == {"not measured"}
    predicted = {PREDICTED + DENSE_1: 0.9}
    lines = table(judged(predicted, {PREDICTED + DENSE_1: "5.5 ms"}), "NVIDIA H200").splitlines()
    (line,) = [line for line in lines if line.startswith(DENSE_1)]
    assert line.split()[-6:] == ["not", "measured;", "predicted", "90%", "(5.5", "ms)"]


def test_the_copy_rate_is_judged_by_the_cards_data_sheet() -> None:
    assert nominal_bytes("NVIDIA H200") == 4.8e12
    assert nominal_bytes("NVIDIA H100 80GB HBM3") == 3.35e12
    assert nominal_bytes("NVIDIA A100-SXM4-80GB") is None
    assert COPY not in [target.figure for target in TARGETS]


def test_what_was_left_undone_is_no_failure_and_an_error_is() -> None:
    section = {"checks": [{"name": "a", "passed": True}], "errors": [], "left_out": ["b"]}
    assert failures({"section": section}) == []
    assert failures({"section": section | {"errors": [{"in": "c"}]}}) == ["section: error in c"]
