"""What a GPU and the machine around it must have, and the one-line errors if they do not."""

import shutil
import sysconfig
from pathlib import Path

import pytest

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
