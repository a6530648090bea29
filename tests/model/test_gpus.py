"""The GPUs that CUDA shows, with a driver that the test makes."""

import ctypes
from dataclasses import dataclass
from typing import Any

import pytest

from persimmon.model.gpus import visible_gpus


@dataclass
class Driver:
    """CUDA's driver: what `cuInit` returns, and how many devices it counts."""

    status: int = 0
    devices: int = 3

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.status

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.devices
        return 0


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def install(monkeypatch: pytest.MonkeyPatch, driver: Driver | None) -> None:
    def load(name: str) -> Driver:
        if driver is None:
            raise OSError(f"{name}: cannot open shared object file")
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)


def test_gpus_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Driver())
    assert visible_gpus() == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("variable", "devices", "shown"),
    [("5,1", 2, ["5", "1"]), ("GPU-a, GPU-b", 2, ["GPU-a", "GPU-b"]), ("0,99,1", 1, ["0"]), ("", 3, [])],
)
def test_the_variable_names_them(
    monkeypatch: pytest.MonkeyPatch, variable: str, devices: int, shown: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    install(monkeypatch, Driver(devices=devices))
    assert visible_gpus() == shown


@pytest.mark.parametrize("driver", [None, Driver(status=100)])
def test_without_a_driver_that_works_there_are_none(monkeypatch: pytest.MonkeyPatch, driver: Driver | None) -> None:
    install(monkeypatch, driver)
    assert visible_gpus() == []
