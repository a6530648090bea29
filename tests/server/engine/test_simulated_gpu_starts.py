"""Every kind of engine starts on a simulated GPU, warms up whole and launches steps of all kinds behind each other.

Kernels are left out: what they compute is the subject of test_simulated_gpu.py.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persimmon.model.runner import PooledStates, PromptLogprobs, SequenceInput
from persimmon.server.config import read_settings
from persimmon.server.engine.loading import load_model
from tests.fake_cuda import fake_cuda
from tests.fake_cuda.checkpoint import VOCAB_SIZE, write_checkpoint
from tests.model.rows import row_with

SIZES = {
    "max_num_seqs": "3",
    "max_num_batched_tokens": "100",
    "max_model_len": "90",
    "block_size": "16",
    "kv_cache_memory": "1MB",
}
LABELS = {"id2label": {"0": "calm", "1": "glad"}}
ENGINES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "eager": ({"enforce_eager": "true"}, {}),
    "float32": ({"dtype": "float32"}, {}),
    "bfloat16": ({"dtype": "bfloat16", "load_format": "dummy"}, {"tie_word_embeddings": True}),
    "more rows than a small step": ({"max_num_seqs": "66", "cuda_graph_sizes": "1,66"}, {}),
    "batch-invariant": ({"batch_invariant": "true"}, {}),
    "guesses": ({"speculative_config": '{"method": "auto"}'}, {}),
    "guesses, batch-invariant": ({"speculative_config": '{"method": "auto"}', "batch_invariant": "true"}, {}),
    "int4": ({"quantization": "int4", "max_num_batched_tokens": "300", "load_format": "dummy"}, {}),
    "int8, batch-invariant": ({"quantization": "int8", "batch_invariant": "true"}, {}),
    "long prompts": ({}, {"max_position_embeddings": 32, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    "classifier": ({"load_format": "dummy"}, {"architectures": ["PersimmonForSequenceClassification"], **LABELS}),
    "token classifier": ({"load_format": "dummy"}, {"architectures": ["PersimmonForTokenClassification"], **LABELS}),
}


def steps(*, generates: bool) -> list[list[SequenceInput]]:
    """Each may follow the one before it before that has ended."""
    scores = PooledStates(range(1, 3), total=False, scores=not generates)
    if not generates:
        return [[SequenceInput([1, 2, 3], 0, [0], (), scores)]]
    words = np.full(-(-VOCAB_SIZE // 32), -1, dtype=np.int32)
    allowed = row_with(allowed=lambda: words, temperature=1.0, top_p=0.5, min_p=0.1)
    return [
        [SequenceInput([1, 2, 3], 0, [0], (allowed, allowed), PromptLogprobs(0, [2, 3], 1))],
        [SequenceInput([-1], 3, [0], (row_with(logprobs=2),)), SequenceInput([-2], 3, [6], (allowed,))],
        [SequenceInput([1, 2], 4, [0], (row_with(), allowed), guesses=1), SequenceInput([3], 4, [6], (row_with(),))],
        [SequenceInput([5] * 70, 0, [1, 2, 3, 4, 5], (row_with(),), prompt_length=70), SequenceInput([-1], 4, [0], ())],
        [SequenceInput([1, 2, 3], 0, [0], (), scores)],
    ]


@pytest.mark.parametrize("kind", ENGINES)
def test_an_engine_starts_and_its_steps_overlap(kind: str, tmp_path: Path) -> None:
    asked, changes = ENGINES[kind]
    config = write_checkpoint(tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    settings = read_settings(SIZES | asked).of_engine()
    with fake_cuda(interprets_kernels=False) as gpu:
        loaded = load_model(settings, tmp_path, lambda line: None)
        generates = loaded.executor.model.config.generates
        gpu.waits.clear()
        pending = [loaded.runner.launch(step) for step in steps(generates=generates)]
        loaded.runner.copy_blocks([(0, 6)])
        # For the step before the last at most, whose buffer it fills again.
        assert set(gpu.waits) <= {"event"}
        for step in pending:
            step.wait()
        assert bool(loaded.runner.graph_replays) == (generates and kind != "eager")
