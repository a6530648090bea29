"""What a GPU and the machine around it must have, and the one-line errors if they do not."""

import re
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
import triton

from persimmon import kernels
from persimmon.kernels.launch import KernelsUnavailableError, check_gpu, next_power_of_2


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with a compiler and headers, whose folder this is."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", {"gcc": "/usr/bin/gcc"}.get)
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    (tmp_path / "Python.h").touch()
    return tmp_path


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_a_recent_gpu_on_a_complete_machine_will_do(complete: Path, capability: tuple[int, int]) -> None:
    check_gpu("H100", capability)


def test_an_older_gpu_is_refused_with_what_is_needed(complete: Path) -> None:
    with pytest.raises(KernelsUnavailableError, match=r"^Tesla T4 has compute capability 7\.5 .* need 8\.0 or later"):
        check_gpu("Tesla T4", (7, 5))


class TestTriton:
    OLD = pytest.mark.parametrize("version", ["3.6.0", "3.7.0", "2.10.3", "3.7.0+git123"])

    @OLD
    def test_before_the_fence_is_refused_with_the_reason(self, complete: Path, monkeypatch, version: str) -> None:
        monkeypatch.setattr(triton, "__version__", version)
        expected = (
            rf"^results on H100 could be wrong: Triton {re.escape(version)} .*triton>=3\.7\.1.* --allow-old-triton"
        )
        with pytest.raises(KernelsUnavailableError, match=expected):
            check_gpu("H100", (9, 0))

    @OLD
    def test_before_the_fence_is_a_warning_where_it_is_allowed(
        self, complete: Path, monkeypatch, caplog: pytest.LogCaptureFixture, version: str
    ) -> None:
        monkeypatch.setattr(triton, "__version__", version)
        check_gpu("H100", (9, 0), allow_old_triton=True)
        [record] = caplog.records
        assert record.levelname == "WARNING"
        assert record.getMessage().startswith(f"results on H100 could be wrong: Triton {version} ")

    def test_is_checked_before_kernels_are_chosen(self, complete: Path, monkeypatch) -> None:
        monkeypatch.setattr(triton, "__version__", "3.6.0")
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        gpu = torch.device("cuda", 0)
        with pytest.raises(KernelsUnavailableError, match="could be wrong"):
            kernels.for_device(gpu)
        assert kernels.for_device(gpu, allow_old_triton=True)

    @pytest.mark.parametrize(
        ("version", "capability"), [("3.7.1", (9, 0)), ("3.10.0", (10, 0)), ("4.0.0a1", (12, 0)), ("3.6.0", (8, 9))]
    )
    def test_with_the_fence_or_without_need_of_it_will_do(
        self, complete: Path, monkeypatch, caplog: pytest.LogCaptureFixture, version: str, capability: tuple[int, int]
    ) -> None:
        monkeypatch.setattr(triton, "__version__", version)
        check_gpu("H100", capability)
        assert caplog.records == []


def test_without_a_compiler_it_says_which_to_install(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", {}.get)
    with pytest.raises(KernelsUnavailableError, match="install gcc, or name one in the variable CC"):
        check_gpu("H100", (9, 0))
    monkeypatch.setenv("CC", "/opt/cc")
    check_gpu("H100", (9, 0))


def test_without_headers_it_says_which_package_has_them(complete: Path) -> None:
    (complete / "Python.h").unlink()
    with pytest.raises(KernelsUnavailableError, match=r"Python\.h is missing.*python3-dev"):
        check_gpu("H100", (9, 0))


@pytest.mark.parametrize(("value", "power"), [(1, 1), (2, 2), (3, 4), (16, 16), (17, 32)])
def test_next_power_of_2_is_the_smallest_that_is_not_below(value: int, power: int) -> None:
    assert next_power_of_2(value) == power
