import json
from pathlib import Path

import pytest

from benchmarks import cpu_formats
from benchmarks.cpu_formats import NETWORKS, measure, table
from persimmon.model.config import PersimmonConfig
from tests.cpu_builds import BUILDS


@pytest.mark.skipif(not BUILDS, reason="no build of the C kernels for this processor")
def test_steps_of_each_format_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_formats, "STEPS", ((1, 1), (2, 1), (2, 1), (1, 5)))
    small = NETWORKS["random"] | {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(small | {"num_hidden_layers": 1, "vocab_size": 64}))
    names = ["float32", "int8", "int4-32"]
    timings = measure(BUILDS[-1], names, PersimmonConfig.from_folder(tmp_path), rounds=1, seconds=0.0)
    assert [timing.format for timing in timings[::4]] == names
    assert [(timing.sequences, timing.tokens) for timing in timings[:4]] == [(1, 1), (2, 1), (2, 1), (1, 5)]
    assert all(timing.us > 0 for timing in timings)
    matrices, head = 64 * 64 * 4 + 2 * 64 * 128, 64 * 64
    assert timings[0].weight_bytes == 4 * (matrices + head)
    scales = 2 * (192 + 64 + 128 + 64)
    assert timings[4].weight_bytes == matrices + scales + head + 2 * 64
    assert timings[8].weight_bytes == matrices // 2 + matrices // 32 * 2 + head + 2 * 64
    assert table(timings).count(BUILDS[-1]) == 3
