"""Cores by the machine and by the control groups of the process."""

import os
from pathlib import Path

import pytest

from persimmon.model.cores import core_shares, usable_cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))


def process(folder: Path, version: int, mount: Path, *, root: str = "/", path: str = "/") -> Path:
    """The files that describe a process in a group."""
    folder.mkdir()
    kind = "cgroup cgroup rw,cpu,cpuacct" if version == 1 else "cgroup2 cgroup rw,nsdelegate"
    (folder / "mountinfo").write_text(f"35 31 0:32 {root} {mount} rw,relatime shared:9 - {kind}\n")
    line = f"4:cpu,cpuacct:{path}" if version == 1 else f"0::{path}"
    (folder / "cgroup").write_text(f"9:name=systemd:/other\n{line}\n")
    return folder


def group(folder: Path, version: int, quota: str) -> Path:
    """A control group's files."""
    folder.mkdir(parents=True, exist_ok=True)
    if version == 2:
        (folder / "cpu.max").write_text(f"{quota} 100000\n")
    else:
        (folder / "cpu.cfs_quota_us").write_text(quota.replace("max", "-1") + "\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")
    return folder


def test_without_control_groups_all_cores_are_used(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == 8


@pytest.mark.parametrize("version", [1, 2])
class TestControlGroups:
    @pytest.mark.parametrize(
        ("quota", "cores"), [("max", 8), ("200000", 2), ("250000", 3), ("50000", 1), ("6400000", 8)]
    )
    def test_the_share_of_the_group_is_kept(self, tmp_path: Path, version: int, quota: str, cores: int) -> None:
        mount = group(tmp_path / "cgroup", version, quota)
        assert usable_cores(process(tmp_path / "proc", version, mount)) == cores

    @pytest.mark.parametrize("tightest", ["/slice/service", "/slice", ""])
    def test_the_smallest_share_of_nested_groups_is_kept(self, tmp_path: Path, version: int, tightest: str) -> None:
        mount = tmp_path / "cgroup"
        for path in ("", "/slice", "/slice/service"):
            group(Path(f"{mount}{path}"), version, "300000" if path == tightest else "max")
        group(mount / "other", version, "100000")
        assert usable_cores(process(tmp_path / "proc", version, mount, path="/slice/service")) == 3

    def test_a_container_sees_its_own_group_at_the_mount(self, tmp_path: Path, version: int) -> None:
        mount = group(tmp_path / "cgroup", version, "200000")
        proc = process(tmp_path / "proc", version, mount, root="/docker/4f2a", path="/docker/4f2a")
        assert usable_cores(proc) == 2

    @pytest.mark.parametrize("content", ["", "nonsense", "0", "-5"])
    def test_files_that_hold_no_share_are_no_limit(self, tmp_path: Path, version: int, content: str) -> None:
        mount = group(tmp_path / "cgroup", version, "200000")
        for path in mount.iterdir():
            path.write_text(content)
        assert usable_cores(process(tmp_path / "proc", version, mount)) == 8


def describe_cores(folder: Path, places: dict[int, tuple[int, int]]) -> Path:
    """The files that give each core's socket, and its number there."""
    for core, (socket, number) in places.items():
        topology = folder / f"cpu{core}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{socket}\n")
        (topology / "core_id").write_text(f"{number}\n")
    return folder


def test_the_threads_of_a_core_and_the_cores_of_a_socket_stay_together(tmp_path: Path) -> None:
    cpus = describe_cores(tmp_path, {core: (core // 2 % 2, core % 2) for core in range(8)})
    assert core_shares(2, cpus) == [{0, 1, 4, 5}, {2, 3, 6, 7}]
    assert core_shares(4, cpus) == [{0, 4}, {1, 5}, {2, 6}, {3, 7}]


@pytest.mark.parametrize("count", range(1, 9))
def test_every_core_is_in_one_part_and_parts_differ_by_at_most_one(tmp_path: Path, count: int) -> None:
    shares = core_shares(count, tmp_path)
    assert sorted(core for share in shares for core in share) == list(range(8))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
