"""How the GPU suite finds out which card it runs on, and compiles ahead for it."""

import json
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import compile_jobs, predictions
from benchmarks.gpu.cli import main
from benchmarks.gpu.compile_pool import CompilePool
from benchmarks.gpu.machine import CLOCKS, FACTS, clocks, description
from benchmarks.gpu.suite import SUITES, Setting
from benchmarks.gpu.worker import Job

CARD = ("NVIDIA H200", "9.0", "570.1", "143771 MiB")


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The driver's tool of a machine with one card; it writes down how it was called."""
    tool, called = tmp_path / "nvidia-smi", tmp_path / "called"
    answers = {",".join(FACTS.values()): ", ".join(CARD), ",".join(CLOCKS): ", ".join(["7"] * len(CLOCKS))}
    cases = "\n".join(f'*"{names}"*) echo "{answer}" ;;' for names, answer in answers.items())
    tool.write_text(f'#!/bin/sh\necho "$@" > {called}\ncase "$*" in\n{cases}\nesac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return called


def test_the_card_is_described_by_what_its_driver_reports(nvidia_smi: Path, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    found = description("cuda", "8b")
    assert tuple(found[name] for name in FACTS) == CARD
    assert clocks() == dict.fromkeys(CLOCKS, "7")
    assert "--id=3" in nvidia_smi.read_text()


def test_without_a_driver_the_command_reports_that_there_is_no_gpu(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert main() == 1
    assert "nvidia-smi reports no GPU" in capsys.readouterr().err


def test_predictions_are_those_of_the_card_at_hand(tmp_path: Path, monkeypatch) -> None:
    rows = [
        {"card": card, "batch": 64, "launch": "attention", "us": us} for card, us in (("H100", 180.0), ("H200", 130.0))
    ]
    path = tmp_path / "roofline_8b.json"
    path.write_text(json.dumps({"predicted": rows}))
    on_gpu = Setting(SUITES["8b"], torch.device("cuda"), 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: CARD[0])
    monkeypatch.setattr(predictions, "PREDICTED", path)
    assert predictions.predicted_us(on_gpu, 64, predictions.ATTENTION, 512) == 130.0
    assert predictions.predicted_us(on_gpu, 64, predictions.ATTENTION, 2048) is None
    assert predictions.predicted_us(on_gpu, 8, predictions.ATTENTION) is None
    monkeypatch.setattr(predictions, "PREDICTED", tmp_path / "absent.json")
    assert predictions.predicted_us(on_gpu, 64, predictions.ATTENTION) is None


@dataclass(frozen=True)
class PlantedJob:
    """Compiles nothing: leaves a file behind, fails, or never ends."""

    name: str
    folder: Path

    def run(self, shape: str) -> None:
        (self.folder / self.name).touch()
        if self.name == "fails":
            raise ValueError(shape)
        if self.name == "hangs":
            threading.Event().wait()


def test_the_first_sections_wait_for_their_kernels_only(tmp_path: Path, monkeypatch, capsys) -> None:
    jobs = {"smoke": ["fails", "one", "two"], "sweep": ["hangs"]}

    def planted(folder: Path, shape: str, section: str) -> Sequence[PlantedJob]:
        return [PlantedJob(name, folder) for name in jobs.get(section, [])]

    monkeypatch.setattr(compile_jobs, "jobs_of", partial(planted, tmp_path))
    pool = CompilePool("9.0", "tiny", ["smoke", "sweep"], "fork")
    job = pool.attached(Job({}, "tiny", "cuda", 0, tmp_path))
    with pool:
        assert job.compiled is not None
        assert job.compiled.wait(60)
        assert {"fails", "one", "two"} <= {path.name for path in tmp_path.iterdir()}
    assert "could not be compiled ahead: ValueError('tiny')" in capsys.readouterr().out
