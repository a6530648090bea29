"""An 8-bit KV cache on the kernels of a GPU, interpreted: the network computes what plain torch does over such a cache.

Forks, prefix hits and graphs' fixed buffers read the blocks and scales that others have written.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from persimmon.kernels import launch, reference
from persimmon.kernels.cache_types import EIGHT_BIT_CACHES
from persimmon.kernels.fused import FusedKernels
from persimmon.kernels.invariant import InvariantKernels
from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.fused_executor import FusedExecutor
from persimmon.model.persimmon import Persimmon
from persimmon.model.runner import Runner, SequenceInput
from persimmon.model.sampling_params import SamplingParams
from persimmon.server.engine.sequence import Sequence
from tests.engine_harness import CPU, Harness, new_tokens, poisoned_cache, runner_of
from tests.fake_cuda.checkpoint import write_checkpoint
from tests.interpreter import keep_language_patched, multiply_as_matrix_units
from tests.model.fused_steps import GREEDY, limits

PROMPT = list(range(7, 27))
TABLE = [2, 0, 3]
TOLERANCE = {torch.int8: 0.02, torch.float8_e4m3fn: 0.06}
"""Of logits, whose deviation is about 1."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_language_patched()
    multiply_as_matrix_units(monkeypatch)


def load(folder: Path, kernels: FusedKernels) -> Persimmon:
    config = PersimmonConfig.from_folder(folder)
    return Persimmon(config, Checkpoint.open(folder, config).tensors(), torch.float16, CPU, kernels)


def runner_on_gpu(model: Persimmon, kernels: FusedKernels, dtype: torch.dtype, num_blocks: int = 4) -> Runner:
    executor = FusedExecutor(kernels, (2,))
    executor.reserve(replace(limits(model.config, 4), max_model_len=64))
    return Runner(executor.start(model, poisoned_cache(model, num_blocks, 16, dtype)))


@pytest.mark.parametrize("dtype", EIGHT_BIT_CACHES.values(), ids=EIGHT_BIT_CACHES)
def test_it_computes_what_plain_torch_computes(folder: Path, dtype: torch.dtype) -> None:
    kernels = FusedKernels(CPU)
    model = load(folder, kernels)
    own, steps = runner_on_gpu(model, kernels, dtype), [(PROMPT[:13], 0), (PROMPT[13:], 13), ([9], len(PROMPT))]
    config = PersimmonConfig.from_folder(folder)
    plain = Persimmon(config, Checkpoint.open(folder, config).tensors(), torch.float32, CPU, reference)
    other = runner_of(plain, poisoned_cache(plain, 4, 16, dtype), reference)
    for tokens, start in steps:
        step = [SequenceInput(tokens, start, TABLE, (GREEDY,))]
        # A key that one rounds up and the other down differs by 1 in 127 of the largest, or by 1 in 8 of itself.
        torch.testing.assert_close(own.logits(step), other.logits(step), rtol=0, atol=TOLERANCE[dtype])


def test_batch_invariant_kernels_give_a_token_the_same_bits_in_any_chunk(folder: Path) -> None:
    kernels = InvariantKernels(CPU)
    runner = runner_on_gpu(load(folder, kernels), kernels, torch.int8)
    whole = runner.logits([SequenceInput(PROMPT, 0, TABLE, (GREEDY,))])
    runner.logits([SequenceInput(PROMPT[:19], 0, TABLE, (GREEDY,))])
    decoded = runner.logits([SequenceInput(PROMPT[19:], 19, TABLE, (GREEDY,))])
    assert torch.equal(decoded, whole)


def test_forks_and_prefix_hits_get_the_tokens_of_each_sample_by_itself(folder: Path) -> None:
    kernels = FusedKernels(CPU)
    model = load(folder, kernels)
    drawn = SamplingParams(temperature=1.0, seed=3, top_p=0.95)

    def sample(index: int, forks: list[Sequence] | None = None) -> Sequence:
        return Sequence(index, list(PROMPT), 2, sampling=drawn, sample_index=index, forks=forks or [])

    def engine() -> Harness:
        runner = runner_on_gpu(model, kernels, torch.int8, num_blocks=8)
        return Harness(model, num_blocks=8, max_num_seqs=4, prefix_caching=True, overlap=True, runner=runner)

    alone = []
    for index in range(2):
        own = sample(index)
        engine().run([own])
        alone.append(new_tokens(own))
    assert alone[0] != alone[1]
    together = engine()
    first = sample(0, [fork := sample(1)])
    together.run([first])
    assert [new_tokens(first), new_tokens(fork)] == alone
    again = sample(0)
    together.run([again])
    assert new_tokens(again) == alone[0]
    assert together.scheduler.stats().cached_tokens > 0


@pytest.mark.parametrize(
    ("capability", "types"),
    [
        ((8, 0), [torch.float16, torch.int8]),
        ((8, 9), [torch.float16, torch.int8, torch.float8_e4m3fn]),
        ((9, 0), [torch.float16, torch.int8, torch.float8_e4m3fn]),
    ],
)
def test_a_gpu_that_does_not_convert_fp8_does_not_offer_it(
    capability: tuple[int, int], types: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_device_facts", lambda device: (108, *capability))
    kernels = FusedKernels(torch.device("cuda", 0))
    assert list(kernels.cache_dtypes(torch.float16)) == types
    assert list(kernels.cache_dtypes(torch.float32)) == [torch.float32]
