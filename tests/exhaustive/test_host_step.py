"""What the benchmark of a GPU's step on the host counts: the launches of a step, and the graphs that save them.

Here because half a minute goes into compiling a step's kernels and capturing its graphs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DECODES, LOGPROBS = "32 decodes", "32 decodes, log-probabilities"
CHUNK, TOP_P, LONG = "32 decodes, a chunk of 64", "32 decodes, a chunk of 64, top-p", "32 decodes, a chunk of 1024"
PROGRAM = f"""
import json
from benchmarks.host_step import measure_all
from persimmon.server.config import Settings
kinds = {[DECODES, LOGPROBS, CHUNK, TOP_P, LONG]}
found = measure_all(Settings(max_num_seqs=40, cuda_graph_sizes=(32, 40)), 1, 1, kinds)
print(json.dumps({{own.step: (own.launches, own.replays, own.bound_ms) for own in found}}))
"""


@pytest.fixture(scope="module")
def found(triton_cache: Path) -> dict[str, list[float | None]]:
    """Launches, replays and bound of kinds of steps of a network of one layer."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(triton_cache)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    counts: dict[str, list[float | None]] = json.loads(run.stdout)
    return counts


def test_a_decode_step_is_one_graph(found: dict[str, list[float | None]]) -> None:
    assert found[DECODES] == found[LOGPROBS] == [0, 1, None]


def test_a_step_with_a_prompt_is_a_graph_and_a_draw(found: dict[str, list[float | None]]) -> None:
    # The draw is lm_head and the merge of its tiles; another from fewer tokens is a graph of its own.
    assert found[CHUNK] == found[TOP_P] == [2, 1, 2.0]


def test_a_longer_step_is_launched_kernel_by_kernel(found: dict[str, list[float | None]]) -> None:
    # Work list, embedding, five of the layer next to cuBLAS, the final norm, and the draw.
    launches, *rest = found[LONG]
    assert launches is not None
    assert launches >= 10
    assert rest == [0, None]
