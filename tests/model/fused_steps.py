"""The path of a GPU on a CPU: a small network through Triton's interpreter, with a cache full of NaN."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from persimmon.kernels import Kernels, StepLimits
from persimmon.kernels.fused import FusedKernels
from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.cuda_graphs import DecodeGraphs
from persimmon.model.fused_executor import FusedExecutor
from persimmon.model.kv_cache import KVCache
from persimmon.model.mixed_graphs import MixedGraphs
from persimmon.model.persimmon import Persimmon
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import Runner, SequenceInput
from tests.engine_harness import CPU, poisoned_cache
from tests.model.checkpoints import make_checkpoint
from tests.model.rows import row_with

BLOCK_SIZE = 16
VOCAB_SIZE = 130
MAX_MODEL_LEN = 304
NEW_TOKENS = 3
GREEDY = row_with()


def tiny_checkpoint(folder: Path, num_hidden_layers: int) -> Path:
    return make_checkpoint(
        folder,
        num_hidden_layers=num_hidden_layers,
        hidden_size=64,
        num_attention_heads=2,
        intermediate_size=192,
        vocab_size=VOCAB_SIZE,
    )


def load(folder: Path, kernels: Kernels, dtype: torch.dtype) -> Persimmon:
    config = PersimmonConfig.from_folder(folder)
    return Persimmon(config, Checkpoint.open(folder, config).tensors(), dtype, CPU, kernels)


def limits(config: PersimmonConfig, max_num_seqs: int) -> StepLimits:
    return StepLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs,
        max_model_len=MAX_MODEL_LEN,
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
    )


@dataclass
class Fused:
    """A model on fused kernels with a cache of its own, full of NaN, and blocks for some sequences."""

    folder: Path
    dtype: torch.dtype = torch.float32
    sizes: Sequence[int] = (1, 4)
    mixed_sizes: Sequence[int] = ()
    guesses: int = 0
    runner: Runner = field(init=False)
    graphs: DecodeGraphs | None = field(init=False, default=None)
    mixed: MixedGraphs | None = field(init=False, default=None)
    model: Persimmon = field(init=False)
    caches: list[torch.Tensor] = field(init=False)
    tables: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        kernels = FusedKernels(CPU)
        self.model = model = load(self.folder, kernels, self.dtype)
        config = model.config
        executor = FusedExecutor(kernels, self.sizes, self.mixed_sizes, guesses=self.guesses)
        executor.reserve(limits(config, 24))
        cache = poisoned_cache(model, 8 * MAX_MODEL_LEN // BLOCK_SIZE, BLOCK_SIZE)
        self.runner = Runner(executor.start(model, cache))
        self.graphs, self.mixed = executor.graphs, executor.mixed
        self.caches = cache.tensors
        self.tables = scattered_tables(cache)

    def fill(self, lengths: Sequence[int]) -> None:
        """Gives sequences random keys and values, always the same."""
        values = torch.Generator().manual_seed(3)
        for tensor in self.caches:
            for length, table in zip(lengths, self.tables, strict=False):
                rows = torch.randn(length, *tensor.shape[1::2], generator=values).to(self.dtype)
                for position, row in enumerate(rows):
                    tensor[table[position // BLOCK_SIZE], :, position % BLOCK_SIZE] = row

    def decode(self, lengths: Sequence[int], others: int = 0) -> list[int]:
        """A token for each sequence, from a cache of random keys and values, next to some of one token each."""
        self.fill(lengths)
        batch = [SequenceInput([3], 0, [self.tables[-1][row]], (GREEDY,)) for row in range(others)]
        batch += [SequenceInput([9], n, t, (GREEDY,)) for n, t in zip(lengths, self.tables, strict=False)]
        return self.runner.run(batch)[others:]

    def generate(self, prompts: Sequence[list[int]], params: Sequence[RowSampling] | None = None) -> list[list[int]]:
        return generate(self.runner, self.tables, prompts, params or [GREEDY] * len(prompts))


def scattered_tables(cache: KVCache) -> list[list[int]]:
    blocks = list(range(cache.num_blocks))
    random.Random(4).shuffle(blocks)
    each = MAX_MODEL_LEN // BLOCK_SIZE
    return [blocks[i * each : (i + 1) * each] for i in range(8)]


def generate(
    runner: Runner, tables: list[list[int]], prompts: Sequence[list[int]], params: Sequence[RowSampling]
) -> list[list[int]]:
    """NEW_TOKENS for each prompt: a step for the prompts, then decode steps of all of them."""
    outputs: list[list[int]] = [[] for _ in prompts]
    batch = [SequenceInput(p, 0, t, (own,)) for p, t, own in zip(prompts, tables, params, strict=False)]
    for position in range(1, NEW_TOKENS + 1):
        for output, token in zip(outputs, runner.run(batch), strict=True):
            output.append(token)
        batch = [
            SequenceInput([out[-1]], len(p) + len(out) - 1, t, (at_position(own, position),))
            for p, out, t, own in zip(prompts, outputs, tables, params, strict=False)
        ]
    return outputs


def assert_same_bits(one: Fused, other: Fused) -> None:
    """Both have written the same keys and values, which depend on everything the network computed before."""
    for own, others in zip(one.caches, other.caches, strict=True):
        torch.testing.assert_close(own, others, rtol=0, atol=0, equal_nan=True)


def at_position(params: RowSampling, position: int) -> RowSampling:
    return replace(params, position=position)


def prompts(*lengths: int) -> list[list[int]]:
    chooser = random.Random(5)
    return [[chooser.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]
