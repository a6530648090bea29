"""Kernels are compiled while the server starts, and none while it serves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, list[str]]]:
    """By the kind of server, the kernels of its warm-up, and those that steps after it compiled."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.model.serving_compilations"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.mark.parametrize(
    "server",
    [
        *("default", "eager", "int8 cache", "batch-invariant", "int4", "short", "long prompts", "classifier"),
        *("images", "images, batch-invariant"),
    ],
)
def test_no_step_after_the_warm_up_compiles_a_kernel(compiled: dict[str, dict[str, list[str]]], server: str) -> None:
    warm_up = compiled[server]["warm-up"]
    assert ("_split_attention_kernel" if "batch-invariant" in server else "_decode_attention") in warm_up
    assert compiled[server]["serving"] == []
