"""An 8-bit KV cache in the engine: forks and steps that overlap get the tokens that each sample gets by itself.

That chunks, prefix hits and preemptions change no bit is tested with batch invariance.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from persimmon import kernels
from persimmon.kernels import Kernels, reference
from persimmon.kernels.cpu import library
from persimmon.model.convert import convert_checkpoint
from persimmon.model.sampling_params import SamplingParams
from persimmon.server.engine.sequence import Sequence
from tests.engine_harness import CPU, Harness, load_model, new_tokens
from tests.model.checkpoints import DEMO_VOCAB_SIZE, make_checkpoint

PROMPT = list(range(7, 47))
DRAWN = SamplingParams(temperature=1.0, seed=3, top_p=0.95)


def sample(index: int, forks: list[Sequence] | None = None) -> Sequence:
    return Sequence(index, list(PROMPT), 12, sampling=DRAWN, sample_index=index, forks=forks or [])


@pytest.fixture(params=["c", "plain torch"])
def operations(request: pytest.FixtureRequest) -> Kernels[Any, Any]:
    if request.param == "plain torch":
        return reference
    if not library.builds():
        pytest.skip("no build of the C kernels for this processor")
    return kernels.for_device(CPU)


def test_forks_and_overlapping_steps_get_the_tokens_of_each_sample_by_itself(
    random_checkpoint: Path,
    operations: Kernels[Any, Any],
) -> None:
    model = load_model(random_checkpoint, operations=operations)

    def engine(*, overlap: bool = False) -> Harness:
        return Harness(
            model,
            num_blocks=24,
            operations=operations,
            prefix_caching=True,
            overlap=overlap,
            cache_dtype=torch.int8,
        )

    alone = []
    for index in range(4):
        own = sample(index)
        engine().run([own])
        alone.append(new_tokens(own))
    assert len({tuple(tokens) for tokens in alone}) > 1
    for overlap in (False, True):
        forks = [sample(index) for index in range(1, 4)]
        first = sample(0, forks)
        engine(overlap=overlap).run([first])
        assert [new_tokens(own) for own in (first, *forks)] == alone


def test_the_rounding_of_the_cache_is_seen_in_log_probabilities(random_checkpoint: Path) -> None:
    model = load_model(random_checkpoint)
    asked = SamplingParams(temperature=0.0, logprobs=1)

    def logprobs(dtype: torch.dtype | None) -> list[float]:
        engine = Harness(model, num_blocks=8, cache_dtype=dtype)
        own = Sequence(0, list(PROMPT), 1, sampling=asked)
        engine.run([own])
        return [entry.logprob for entry in engine.reports[own].logprobs]

    exact, rounded = logprobs(None), logprobs(torch.int8)
    assert exact != rounded
    assert rounded == pytest.approx(exact, abs=0.2)


def test_a_trimmed_vocabulary_gets_the_same_tokens_with_shared_prefixes_and_preemptions(tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path / "whole", vocab_size=DEMO_VOCAB_SIZE + 64, num_hidden_layers=2)
    weights = load_file(whole / "model.safetensors")
    weights["lm_head.weight"][DEMO_VOCAB_SIZE:] = 0.0  # never the best
    save_file(weights, whole / "model.safetensors", metadata={"format": "pt"})
    given: dict[str, Any] = {"layout": "hugging_face", "dtype": None, "max_shard_bytes": 10**9, "trim_vocab": True}
    convert_checkpoint(str(whole), tmp_path / "trimmed", print_line=lambda _: None, **given)
    prompts = [[*PROMPT, *range(100 + index, 120 + index)] for index in range(6)]
    found = []
    for folder in (whole, tmp_path / "trimmed"):
        model = load_model(folder)
        for num_blocks in (64, 14):
            engine = Harness(
                model, num_blocks=num_blocks, prefix_caching=True, typical_output=1, cache_dtype=torch.int8
            )
            found.append([new_tokens(own) for own in engine.generate(prompts, 24)])
            assert engine.stats.cached_tokens > 0
            assert (engine.stats.preemptions > 0) == (num_blocks == 14)
    assert model.config.vocab_size == DEMO_VOCAB_SIZE
    assert all(tokens == found[0] for tokens in found)
