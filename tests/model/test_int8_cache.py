"""An 8-bit KV cache in the engine: forks and steps that overlap get the tokens that each sample gets by itself.

That chunks, prefix hits and preemptions change no bit is tested with batch invariance.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from persimmon import kernels
from persimmon.kernels import Kernels, reference
from persimmon.kernels.cpu import library
from persimmon.model.sampling_params import SamplingParams
from persimmon.server.engine.sequence import Sequence
from tests.engine_harness import CPU, Harness, load_model, new_tokens

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
