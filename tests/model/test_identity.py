"""A checkpoint whose files were replaced is distinguished from an unchanged one."""

import os
import shutil
from pathlib import Path

import pytest

from persimmon.model.identity import change, identity
from tests.model.checkpoints import DEMO


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(DEMO, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("*.py", "__pycache__"))


def replace_with_a_copy(path: Path) -> None:
    copy = path.with_name(f"{path.name}.partial")
    copy.write_bytes(path.read_bytes())
    os.replace(copy, path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "model.safetensors"])
def test_a_file_that_is_replaced_added_or_removed_is_named(folder: Path, name: str) -> None:
    before = identity(folder)
    assert change(before, identity(folder)) is None
    replace_with_a_copy(folder / name)
    assert change(before, identity(folder)) == f"{name} was replaced or changed"
    (folder / name).unlink()
    assert change(before, identity(folder)) == f"{name} was deleted"
    assert change(identity(folder), before) == f"{name} was added"


def test_a_file_that_is_written_in_place_is_named(folder: Path) -> None:
    before = identity(folder)
    with (folder / "config.json").open("a") as file:
        file.write("\n")
    assert change(before, identity(folder)) == "config.json was replaced or changed"


def test_what_a_link_leads_to_counts(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.mkdir()
    for path in folder.iterdir():
        (link / path.name).symlink_to(path)
    before = identity(link)
    assert before == identity(folder)
    replace_with_a_copy(folder / "model.safetensors")
    assert change(before, identity(link)) == "model.safetensors was replaced or changed"


def test_files_that_no_server_reads_may_change(folder: Path) -> None:
    before = identity(folder)
    (folder / "README.md").write_text("new")
    (folder / "optimizer.pt").write_text("new")
    assert change(before, identity(folder)) is None


def test_a_folder_that_is_gone_has_lost_its_files(folder: Path) -> None:
    before = identity(folder)
    shutil.rmtree(folder)
    assert change(before, identity(folder)) == f"{min(before)} was deleted"
