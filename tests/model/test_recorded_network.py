"""The network as a program of C kernels: the same bits on any number of threads, however they are scheduled."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from persimmon.kernels import StepLimits
from persimmon.kernels.cpu import library
from persimmon.kernels.cpu.native import NativeKernels
from persimmon.model.persimmon import Persimmon, Step
from persimmon.model.recorded_network import RecordedNetwork, record
from tests.engine_harness import load_model, poisoned_cache

pytestmark = pytest.mark.skipif(not library.builds(), reason="no build of the C kernels for this processor")

BLOCK_SIZE, BLOCKS_EACH, SEQUENCES = 16, 4, 12


@pytest.fixture(scope="module")
def model(random_checkpoint: Path) -> Persimmon:
    return load_model(random_checkpoint)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Network:
    """A recorded network with a cache of its own."""

    def __init__(self, model: Persimmon, max_tokens: int = 64) -> None:
        self.kernels = NativeKernels(library.builds()[0])
        self.cache = poisoned_cache(model, SEQUENCES * BLOCKS_EACH, BLOCK_SIZE)
        self.network = RecordedNetwork(model=model, cache=self.cache, kernels=self.kernels, max_tokens=max_tokens)

    def step(self, parts: list[tuple[int, int, int]], rows: list[int] | None = None) -> torch.Tensor:
        """The hidden states of one step: for each part a sequence, its first position and how many tokens.

        Of all its rows, or of those that are wanted.
        """
        ids = [
            random.Random(1000 * sequence + start + i).randrange(2, 4096)
            for sequence, start, count in parts
            for i in range(count)
        ]
        plan = self.kernels.plan_attention(
            [range(sequence * BLOCKS_EACH, (sequence + 1) * BLOCKS_EACH) for sequence, _, _ in parts],
            [start for _, start, _ in parts],
            [count for _, _, count in parts],
            num_blocks=self.cache.num_blocks,
            num_heads=self.cache.num_heads,
            block_size=BLOCK_SIZE,
            dtype=self.cache.dtype,
            device=self.cache.device,
        )
        return self.network.forward(
            Step(torch.tensor(ids), plan, None if rows is None else torch.tensor(rows, dtype=torch.int64))
        )


def steps(seed: int, count: int) -> list[list[tuple[int, int, int]]]:
    """Steps in which a few sequences each go on by a few tokens."""
    dice, lengths, result = random.Random(seed), [0] * SEQUENCES, []
    for _ in range(count):
        parts = []
        for sequence in dice.sample(range(SEQUENCES), dice.randint(1, SEQUENCES)):
            tokens = min(dice.choice((1, 1, 1, 2, 9)), BLOCK_SIZE * BLOCKS_EACH - lengths[sequence])
            if tokens:
                parts.append((sequence, lengths[sequence], tokens))
                lengths[sequence] += tokens
        if parts:
            result.append(parts)
    return result


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [2, 3, 7])
def test_more_threads_than_cores_change_no_bit(model: Persimmon, count: int) -> None:
    alone, together = Network(model), Network(model)
    for parts in steps(seed=count, count=60):
        torch.set_num_threads(1)
        expected = alone.step(parts)
        torch.set_num_threads(count)
        assert torch.equal(together.step(parts), expected)


@pytest.mark.usefixtures("threads")
def test_programs_of_several_threads_at_once_wait_for_one_another(model: Persimmon) -> None:
    from concurrent.futures import ThreadPoolExecutor

    torch.set_num_threads(3)
    plans = [steps(seed=seed, count=25) for seed in range(4)]

    def run(plan: list[list[tuple[int, int, int]]]) -> list[torch.Tensor]:
        network = Network(model)
        return [network.step(parts) for parts in plan]

    expected = [run(plan) for plan in plans]
    with ThreadPoolExecutor(len(plans)) as pool:
        for results, wanted in zip(pool.map(run, plans), expected, strict=True):
            assert all(torch.equal(result, own) for result, own in zip(results, wanted, strict=True))


def test_a_step_larger_than_the_buffers_makes_them_grow(model: Persimmon) -> None:
    small, large = Network(model, max_tokens=4), Network(model)
    for parts in ([(0, 0, 3)], [(1, 0, 50), (2, 0, 9)], [(0, 3, 1), (1, 50, 1)]):
        assert torch.equal(small.step(parts), large.step(parts))


def test_the_recorded_network_is_the_network(model: Persimmon) -> None:
    recorded, direct = Network(model), Network(model)
    direct.network.forward = lambda step: model.forward(step, direct.cache, direct.kernels)  # type: ignore[method-assign]
    for parts in steps(seed=0, count=10):
        assert torch.equal(recorded.step(parts), direct.step(parts))


def test_wanted_rows_have_the_bits_they_have_among_all(model: Persimmon) -> None:
    some, every = Network(model), Network(model)
    dice = random.Random(7)
    for parts in steps(seed=1, count=40):
        total = sum(count for _, _, count in parts)
        wanted = [dice.randrange(total) for _ in range(dice.randint(0, total))]
        assert torch.equal(some.step(parts, wanted), every.step(parts)[wanted])


def test_buffers_take_what_the_plan_counts(model: Persimmon) -> None:
    config, operations = model.config, NativeKernels(library.builds()[0])
    limits = StepLimits(
        max_num_seqs=1,
        max_num_batched_tokens=100,
        max_model_len=100,
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
    )
    program = record(model, poisoned_cache(model, BLOCKS_EACH, BLOCK_SIZE), operations, limits.max_num_batched_tokens)
    inputs = 100 * max(config.hidden_size, config.intermediate_size) * torch.float32.itemsize
    buffers = sum(buffer.nbytes for buffer in program._buffers.values())
    assert buffers + inputs == operations.workspace_bytes(limits)
    # qkv and what attention makes of it are not needed any more when the MLP's inner values are made.
    qkv_and_attended, inner = 4 * config.hidden_size, config.intermediate_size
    assert buffers == 100 * 4 * (config.hidden_size + max(qkv_and_attended, inner))
