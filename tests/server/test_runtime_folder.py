import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from persimmon.server.runtime_folder import RuntimeFolderError, remove_stale, runtime_folder


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place for temporary files whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def leave_behind(parent: Path) -> Path:
    """The folder of a process that was killed."""
    program = (
        "import os, signal, tempfile\n"
        f"tempfile.tempdir = {str(parent)!r}\n"
        "from persimmon.server.runtime_folder import runtime_folder\n"
        "with runtime_folder() as folder:\n"
        "    (folder / 'vitals').touch()\n"
        "    print(folder, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    folder = Path(ended.stdout.strip())
    assert (folder / "vitals").exists()
    return folder


def test_the_folder_of_a_killed_server_is_removed_by_the_next_one(temporary):
    stale = leave_behind(temporary)
    with runtime_folder() as folder:
        assert list(temporary.iterdir()) == [folder]
        assert not stale.exists()
    assert not list(temporary.iterdir())


def test_the_folder_of_a_running_server_stays(temporary):
    with runtime_folder() as first, runtime_folder() as second:
        remove_stale(temporary)
        assert {first, second} == set(temporary.iterdir())


def test_what_only_looks_like_such_a_folder_stays(temporary):
    for name in ("persimmon-run-12345678x", "persimmon-12345678", "other"):
        (temporary / name).mkdir(mode=0o700)
    (temporary / "persimmon-run-readable").mkdir(mode=0o755)
    with_folder = temporary / "persimmon-run-withfold"
    with_folder.mkdir(mode=0o700)
    (with_folder / "photos").mkdir()
    (temporary / "persimmon-run-linklink").symlink_to(temporary / "other")
    before = sorted(os.listdir(temporary))
    remove_stale(temporary)
    assert sorted(os.listdir(temporary)) == before


def test_a_path_that_is_too_long_for_sockets_is_an_error_with_the_numbers(temporary, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / ("long" * 25)))
    with pytest.raises(RuntimeFolderError, match=r"at most 7\d bytes\); set TMPDIR to a shorter one"), runtime_folder():
        pass


def test_a_place_that_cannot_be_written_is_an_error_that_says_what_to_do(temporary, monkeypatch):
    (temporary / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "file"))
    with pytest.raises(RuntimeFolderError, match="Not a directory; set TMPDIR to a writable folder"), runtime_folder():
        pass
