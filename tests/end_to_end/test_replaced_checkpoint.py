"""A checkpoint that is replaced on disk is not served in parts: not by a new engine, nor by a new API worker."""

import os
import shutil
import signal
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.serving import serving
from tests.model.checkpoints import DEMO


@pytest.mark.parametrize("child", ["engine", "api"])
def test_a_child_is_not_started_again_on_other_files(child: str, tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    with serving("--model", str(folder), "--kv-cache-memory", "26MB") as server:
        asked = {"prompt": "Hi", "max_tokens": 2}
        assert httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60).status_code == 200
        copy = tmp_path / "model.safetensors"
        shutil.copyfile(folder / "model.safetensors", copy)
        os.replace(copy, folder / "model.safetensors")
        # Replacing a file changes nothing by itself: everything was read at the start.
        assert httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60).status_code == 200
        os.kill(server.children()[child], signal.SIGKILL)
        assert server.wait() == 1
    (line,) = [line for line in server.lines if "has changed since the server started" in line]
    assert line.startswith(f"persimmon: error: the checkpoint in {folder} ")
    assert "(model.safetensors was replaced or changed)" in line
    assert "The engine is serving again" not in server.lines
