"""The benchmark of tensor parallelism, in small."""

import os
from pathlib import Path

import pytest

from benchmarks import scale_out_tensor_parallel as benchmark
from benchmarks.rank_sums import measure_sums
from persimmon.model.config import PersimmonConfig
from persimmon.model.ranks import bytes_of_sum
from tests.model.checkpoints import make_checkpoint


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each rank needs a core")
def test_cases_take_turns_and_sums_are_measured_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {"one": (1, 1), "two": (2, 1)}
    monkeypatch.setattr(benchmark, "CASES", cases)
    folder = make_checkpoint(tmp_path, num_hidden_layers=1)
    steps = benchmark.measure(folder, rounds=1, seconds=0.0)
    assert [(own.case, own.sequences, own.tokens) for own in steps] == [
        (case, *kind) for case in cases for kind in benchmark.STEPS
    ]
    assert all(own.tokens_per_s > 0 for own in steps)
    sums = measure_sums(PersimmonConfig.from_folder(folder), benchmark.ROWS, seconds=0.0)
    assert [own.rows for own in sums] == benchmark.ROWS
    assert all(own.us > 0 for own in sums)
    # The embedding's and two of the layer's.
    assert [own.sent_bytes for own in sums] == [3 * bytes_of_sum(own.rows * 128 * 4, 2) for own in sums]
    assert all(case in benchmark.table(steps, sums) for case in cases)
