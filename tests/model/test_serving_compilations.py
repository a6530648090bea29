"""Kernels are compiled while the server starts, and none while it serves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("--max-num-seqs=1", "--enforce-eager"),
        ("--max-num-seqs=8",),
        ("--architecture=PersimmonForTokenClassification",),
    ],
    ids=["default", "eager", "few", "classifier"],
)
def test_no_step_after_the_warm_up_compiles_a_kernel(settings: tuple[str, ...], triton_cache: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "tests.model.serving_compilations", *settings],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(triton_cache)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    compiled = json.loads(found.stdout)
    assert "_decode_attention" in compiled["warm-up"]
    assert compiled["serving"] == []
