"""What control groups leave: of both versions, of the groups around this one, and of one that is real."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from persimmon.model.memory_limits import MemoryLeft, memory_left

GIB = 1 << 30
ROOT_LIMIT = 2**63 - 4096
"""What version 1 says of a group without a limit."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 10 GiB free."""
    memory = psutil.virtual_memory()._replace(available=10 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def group(folder: Path, version: int, limit: int | str, usage: int, idle: int = 0, **more: object) -> Path:
    """A control group's files."""
    folder.mkdir(parents=True, exist_ok=True)
    total = "total_" if version == 1 else ""
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    files: Mapping[str, object] = {
        names[0]: limit,
        names[1]: usage,
        "memory.stat": f"cache 1\n{total}inactive_file {idle}\nrss 2",
        **{f"memory.{name}": value for name, value in more.items()},
    }
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")
    return folder


def process(folder: Path, version: int, mount: Path, *, root: str = "/", path: str = "/") -> Path:
    """The files that describe a process in such a group."""
    folder.mkdir()
    kind = "cgroup cgroup rw,memory" if version == 1 else "cgroup2 cgroup rw,nsdelegate"
    shown = str(mount).replace(" ", "\\040")
    (folder / "mountinfo").write_text(
        f"22 1 0:20 / /proc rw - proc proc rw\n35 31 0:32 {root} {shown} rw,relatime shared:9 - {kind}\n"
    )
    line = f"4:cpu,memory:{path}" if version == 1 else f"0::{path}"
    (folder / "cgroup").write_text(f"9:name=systemd:/other\n{line}\n")
    return folder


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("version", [1, 2])
class TestOneGroup:
    def test_leaves_its_limit_less_what_is_used(self, tmp_path: Path, version: int) -> None:
        mount = group(tmp_path / "cgroup", version, 4 * GIB, 3 * GIB)
        left = memory_left(process(tmp_path / "proc", version, mount))
        assert left == MemoryLeft(GIB, 4 * GIB, mount)
        assert str(left) == f"left of the 4.00 GiB that the control group {mount} allows"

    def test_counts_idle_file_pages_as_free(self, tmp_path: Path, version: int) -> None:
        mount = group(tmp_path / "cgroup", version, 4 * GIB, 3 * GIB, 2 * GIB)
        assert memory_left(process(tmp_path / "proc", version, mount)).bytes == 3 * GIB

    def test_leaves_nothing_when_it_is_over_its_limit(self, tmp_path: Path, version: int) -> None:
        mount = group(tmp_path / "cgroup", version, GIB, 2 * GIB)
        assert memory_left(process(tmp_path / "proc", version, mount)).bytes == 0

    def test_without_a_limit_leaves_what_the_machine_has(self, tmp_path: Path, version: int) -> None:
        mount = group(tmp_path / "cgroup", version, ROOT_LIMIT if version == 1 else "max", GIB)
        left = memory_left(process(tmp_path / "proc", version, mount))
        assert left == MemoryLeft(10 * GIB)
        assert str(left) == "left of this machine's memory"

    def test_cannot_have_more_than_the_machine(self, tmp_path: Path, version: int) -> None:
        mount = group(tmp_path / "cgroup", version, 100 * GIB, GIB)
        assert memory_left(process(tmp_path / "proc", version, mount)) == MemoryLeft(10 * GIB)

    @pytest.mark.parametrize("name", ["cgroup", "mountinfo"])
    def test_that_cannot_be_read_is_none(self, tmp_path: Path, version: int, name: str) -> None:
        mount = group(tmp_path / "cgroup", version, 4 * GIB, 3 * GIB)
        proc = process(tmp_path / "proc", version, mount, path="/")
        (proc / name).unlink()
        # The mounted group is this process's own where nothing says which one is.
        assert memory_left(proc).bytes == (GIB if name == "cgroup" else 10 * GIB)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("version", [1, 2])
class TestNestedGroups:
    @pytest.mark.parametrize("tightest", ["/slice/service", "/slice", ""])
    def test_the_tightest_one_counts(self, tmp_path: Path, version: int, tightest: str) -> None:
        mount = tmp_path / "mounted here"
        for path in ("", "/slice", "/slice/service"):
            group(Path(f"{mount}{path}"), version, GIB if path == tightest else 8 * GIB, GIB // 4)
        left = memory_left(process(tmp_path / "proc", version, mount, path="/slice/service"))
        assert left == MemoryLeft(GIB * 3 // 4, GIB, Path(f"{mount}{tightest}"))

    def test_a_fuller_one_counts_before_a_smaller_one(self, tmp_path: Path, version: int) -> None:
        mount = group(tmp_path / "cgroup", version, 8 * GIB, 7 * GIB + GIB // 2)
        group(mount / "service", version, 2 * GIB, GIB)
        assert memory_left(process(tmp_path / "proc", version, mount, path="/service")).bytes == GIB // 2

    def test_a_container_sees_its_own_group_at_the_mount(self, tmp_path: Path, version: int) -> None:
        mount = group(tmp_path / "cgroup", version, 2 * GIB, GIB)
        proc = process(tmp_path / "proc", version, mount, root="/docker/4f2a", path="/docker/4f2a")
        assert memory_left(proc).bytes == GIB

    def test_a_group_within_a_containers_is_found(self, tmp_path: Path, version: int) -> None:
        mount = group(tmp_path / "cgroup", version, 8 * GIB, GIB)
        group(mount / "inner", version, GIB, 0)
        proc = process(tmp_path / "proc", version, mount, root="/docker/4f2a", path="/docker/4f2a/inner")
        assert memory_left(proc) == MemoryLeft(GIB, GIB, mount / "inner")

    @pytest.mark.parametrize("path", ["/../../other", "/elsewhere", "/docker/4f2a5"])
    def test_a_path_outside_of_the_mount_stands_for_the_mount(self, tmp_path: Path, version: int, path: str) -> None:
        mount = group(tmp_path / "cgroup", version, 2 * GIB, GIB)
        assert memory_left(process(tmp_path / "proc", version, mount, root="/docker/4f2a", path=path)).bytes == GIB


@pytest.mark.usefixtures("machine")
def test_a_group_that_is_slowed_down_has_that_limit_too(tmp_path: Path) -> None:
    mount = group(tmp_path / "cgroup", 2, 4 * GIB, GIB, high=2 * GIB)
    assert memory_left(process(tmp_path / "proc", 2, mount)) == MemoryLeft(GIB, 2 * GIB, mount)


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A control group of 256 MiB, where this machine lets tests make one."""
    folder = Path(f"/sys/fs/cgroup/memory/persimmon-test-{os.getpid()}")
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(256 << 20))
    except OSError:
        pytest.skip("no control group can be made here")
    yield folder
    folder.rmdir()


def in_group(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in a control group."""
    joined = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
    return subprocess.run(
        ["/bin/sh", "-c", joined, str(folder), *command], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_limit_of_a_real_group_is_found(real_group: Path) -> None:
    program = (
        "from persimmon.model.memory_limits import memory_left as left; print(left().limit, left().group, left().bytes)"
    )
    ended = in_group(real_group, sys.executable, "-c", program)
    limit, found, left = ended.stdout.split()
    assert (int(limit), found) == (256 << 20, str(real_group))
    assert 0 < int(left) < 256 << 20


def test_a_server_that_has_no_room_is_refused_with_the_numbers(real_group: Path) -> None:
    ended = in_group(real_group, sys.executable, "-m", "persimmon.server.cli", "serve", "--port", "0")
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("persimmon: error: not enough memory: an engine and 1 API worker take about ")
    assert f"left of the 256.0 MiB that the control group {real_group} allows" in line
