"""Which part of the machine each of several engines gets, and what is refused before anything starts."""

import os

import pytest

from persimmon.server import engine_places
from persimmon.server.commands.run import run
from persimmon.server.embedded import EmbeddedServer
from persimmon.server.engine_places import WHOLE_MACHINE, MachineShare, machine_shares
from persimmon.server.settings.section import SettingsError


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without GPUs."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(engine_places, "usable_cores", lambda: 8)
    monkeypatch.setattr(engine_places, "version", lambda package: "2.13.0")
    set_gpus(monkeypatch)


def set_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: str) -> None:
    monkeypatch.setattr(engine_places, "visible_gpus", lambda: list(gpus))


def test_a_single_engine_has_the_whole_machine() -> None:
    assert machine_shares(1) == [WHOLE_MACHINE]


@pytest.mark.parametrize("engines", [2, 3, 8])
def test_without_gpus_engines_divide_the_cores(engines: int) -> None:
    shares = machine_shares(engines)
    assert sorted(core for share in shares for core in share.cores) == list(range(8))
    assert all(share.gpus is None for share in shares)


def test_time_on_cores_that_others_use_too_is_divided_as_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_places, "usable_cores", lambda: 5)
    assert machine_shares(2) == [MachineShare(threads=2)] * 2


def test_each_engine_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpus(monkeypatch, "3", "GPU-a", "1")
    assert machine_shares(2) == [MachineShare(gpus="3"), MachineShare(gpus="GPU-a")]


def test_a_torch_without_cuda_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpus(monkeypatch, "0")
    monkeypatch.setattr(engine_places, "version", lambda package: "2.13.0+cpu")
    assert all(share.cores for share in machine_shares(2))


def test_more_engines_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpus(monkeypatch, "0", "1")
    with pytest.raises(
        SettingsError,
        match="is 3, which needs 3 GPUs, but only 2 GPUs are visible: lower it, or",
    ):
        machine_shares(3)


@pytest.mark.parametrize("engines", [9, 256])
def test_more_engines_than_cores_are_refused_on_one_line(engines: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--data-parallel-size", str(engines)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        f"persimmon: error: --data-parallel-size is {engines}, which needs {engines} cores, but only 8 cores are "
        f"usable: lower it"
    )


@pytest.mark.parametrize("value", ["0", "-1", "two", "1000"])
def test_a_size_that_is_none_is_refused(value: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--data-parallel-size", value]) == 2
    assert f"--data-parallel-size (or PERSIMMON_DATA_PARALLEL_SIZE) is {value}:" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("ranks", "reason"),
    [
        ("3", "--tensor-parallel-size is 3, which does not divide this model's 4 attention heads"),
        ("16", "--tensor-parallel-size is 16, which needs 16 cores, but only 8 cores are usable: lower it"),
        ("0", "--tensor-parallel-size (or PERSIMMON_TENSOR_PARALLEL_SIZE) is 0: "),
    ],
)
def test_ranks_that_cannot_be_are_refused_on_one_line(
    ranks: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["serve", "--tensor-parallel-size", ranks]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"persimmon: error: {reason}")


def test_an_embedded_server_has_one_engine(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingsError, match="data_parallel_size is not a setting of EmbeddedServer"):
        EmbeddedServer(data_parallel_size=2)
    with pytest.raises(SystemExit):
        run(["generate", "in.jsonl", "out.jsonl", "--data-parallel-size", "2"])
    assert "--data-parallel-size" in capfd.readouterr().err


def test_a_process_keeps_to_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[frozenset[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: taken.append(cores))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # so that the end of the test takes away what it sets
    monkeypatch.delenv("OMP_NUM_THREADS")
    WHOLE_MACHINE.take()
    assert (taken, os.environ["CUDA_VISIBLE_DEVICES"]) == ([], "0,1")
    MachineShare(cores=frozenset({2, 3})).take()
    MachineShare(gpus="1").take()
    MachineShare(threads=4).take()
    assert (taken, os.environ["CUDA_VISIBLE_DEVICES"]) == ([frozenset({2, 3})], "1")
    assert os.environ["OMP_NUM_THREADS"] == "4"
    MachineShare(threads=2).take()  # what a person has set holds
    assert os.environ["OMP_NUM_THREADS"] == "4"


def test_the_ranks_of_an_engine_have_neighbouring_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpus(monkeypatch, "0", "1", "2", "3")
    assert machine_shares(2, ranks=2) == [MachineShare(gpus="0,1"), MachineShare(gpus="2,3")]
    assert machine_shares(1, ranks=4) == [WHOLE_MACHINE]
    with pytest.raises(SettingsError, match="is 2 and --tensor-parallel-size is 3, which needs 6 GPUs"):
        machine_shares(2, ranks=3)
    with pytest.raises(SettingsError, match="--tensor-parallel-size is 8, which needs 8 GPUs, but only 4 GPUs"):
        machine_shares(1, ranks=8)
    set_gpus(monkeypatch)
    with pytest.raises(SettingsError, match="is 4 and --tensor-parallel-size is 3, which needs 12 cores"):
        machine_shares(4, ranks=3)
