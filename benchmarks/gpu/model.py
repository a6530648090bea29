"""The network with random weights, a filled cache and chosen shares of zero activations, for whole steps.

Knows how the parts of a server fit together without a server; measures nothing.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.suite import Setting, Suite
from persimmon.kernels import Kernels, StepLimits, projection
from persimmon.kernels.fused import FusedKernels
from persimmon.model.checkpoint import dummy_tensors, expected_shapes
from persimmon.model.config import PersimmonConfig
from persimmon.model.cuda_graphs import DecodeGraphs
from persimmon.model.fused_executor import FusedExecutor
from persimmon.model.graphs import GraphRecorder, capture_all
from persimmon.model.kv_cache import KVCache
from persimmon.model.persimmon import Persimmon
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import Runner, SequenceInput
from persimmon.model.sampling_params import SamplingParams

WEIGHT_DEVIATION = 0.02
"""Of the matrices that `dummy_tensors` draws."""

GREEDY = RowSampling(asked=SamplingParams(temperature=0.0))


def random_model(
    setting: Setting, config: PersimmonConfig, dtype: torch.dtype, kernels: Kernels[Any, Any], *, stored: torch.dtype
) -> Persimmon:
    """The network with weights drawn on the device in the type `stored`; the same seed makes the same ones.

    On the meta device, where nothing can be drawn, they have shapes only.
    """
    tensors = dummy_tensors(config, stored, setting.device, setting.seed)
    if setting.device.type == "meta":
        tensors = (
            (name, torch.empty(shape, dtype=stored, device="meta")) for name, shape in expected_shapes(config).items()
        )
    return Persimmon(config=config, tensors=tensors, dtype=dtype, device=setting.device, kernels=kernels)


def limits(suite: Suite) -> StepLimits:
    """What buffers are made for; the same in all sections, because some kernels are compiled for these sizes."""
    config = suite.config
    return StepLimits(
        max_num_seqs=suite.max_num_seqs,
        max_num_batched_tokens=suite.chunk + suite.max_num_seqs,
        max_model_len=suite.max_model_len,
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
    )


def plant_zeros(model: Persimmon, zeros: float, *, shared: bool = False) -> None:
    """Shifts the biases of the MLPs' first projections so that about this share of their activations is zero.

    The norm's output has variance 1, so pre-activations are normal with deviation 0.02 * sqrt(hidden), and their
    mean decides.  Each token then has zeros of its own; shared, a random share of the neurons never fires and the
    others always do.
    """
    deviation = WEIGHT_DEVIATION * model.config.hidden_size**0.5
    always = 8 * deviation
    shift = deviation * NormalDist().inv_cdf(min(max(1 - zeros, 1e-9), 1 - 1e-9))
    generator = torch.Generator(model.device).manual_seed(1)
    for layer in model.layers:
        bias = layer.mlp_up.bias
        if bias is None:
            raise ValueError("the network's MLP has no bias to plant zeros with")
        bias.fill_(always if zeros == 0 else shift)
        if shared:
            places = torch.rand(bias.shape, device=bias.device, generator=generator)
            bias.copy_(torch.where(places < zeros, -always, always))


@dataclass(slots=True)
class SeenZeros:
    """Shares of zeros among the activations that met the last projection, and of its rows that no token needed."""

    activations: list[float]
    unread_rows: list[float]

    @property
    def zeros(self) -> float:
        """Mean over the layers."""
        return sum(self.activations) / max(1, len(self.activations))

    @property
    def unread(self) -> float:
        """Mean over the layers."""
        return sum(self.unread_rows) / max(1, len(self.unread_rows))


@contextmanager
def seen_zeros() -> Iterator[SeenZeros]:
    """Counts zeros in what eager steps feed the MLPs' last projection."""
    seen = SeenZeros([], [])
    project_add_ = projection.project_add_

    def counting(x: torch.Tensor, activation: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        if named.get("transposed"):
            is_zero = activation == 0
            seen.activations.append(is_zero.float().mean().item())
            seen.unread_rows.append(is_zero.all(0).float().mean().item())
        return project_add_(x, activation, *others, **named)

    with mock.patch.object(projection, "project_add_", counting):
        yield seen


@contextmanager
def skipping(kernels: FusedKernels, most_tokens: int) -> Iterator[None]:
    """Maximum tokens of a step that skips MLP rows; 0 for none."""
    usual, kernels.sparse_step = kernels.sparse_step, most_tokens
    try:
        yield
    finally:
        kernels.sparse_step = usual


@dataclass(frozen=True, slots=True)
class Machine:
    """What runs steps.

    Attributes:
        model: the network.
        cache: filled with random keys and values, so that any context exists already.
        kernels: the model's.
        limits: what buffers are made for.
    """

    model: Persimmon
    cache: KVCache
    kernels: FusedKernels
    limits: StepLimits

    @classmethod
    def build(
        cls,
        setting: Setting,
        dtype: torch.dtype,
        *,
        num_blocks: int,
        layers: int | None = None,
        block_size: int | None = None,
        kernels_type: type[FusedKernels] = FusedKernels,
    ) -> "Machine":
        """With random weights; dependent launch is off until `kernels.pdl` is set.

        Args:
            setting: the suite, whose network it is.
            dtype: of weights and cache.
            num_blocks: of the cache.
            layers: of the network, if not all.
            block_size: tokens of a block, if not the suite's.
            kernels_type: the operations.
        """
        suite = setting.suite
        config = replace(suite.config, num_hidden_layers=layers or suite.config.num_hidden_layers)
        kernels = kernels_type(setting.device)
        model = random_model(setting, config, dtype, kernels, stored=dtype)
        kernels.reserve(limits(suite))
        cache = KVCache.allocate(config, num_blocks, block_size or suite.block_size, dtype, setting.device)
        if setting.device.type != "meta":
            generator = setting.generator()
            for layer in cache.tensors:
                layer.normal_(generator=generator)
        return cls(model, cache, kernels, limits(suite))

    def shallow(self, layers: int) -> "Machine":
        """The same with its first layers only, on the same weights, cache and buffers."""
        model = copy.copy(self.model)
        model.layers = model.layers[:layers]
        return replace(self, model=model, cache=KVCache(self.cache.layers[:layers]))

    def counters(self) -> list[torch.Tensor]:
        """What programs of one launch count their arrivals with; zero between launches."""
        workspaces = self.kernels._workspaces
        return [workspaces.decode.arrivals, workspaces.projection.counters]

    def logprobs(self, rows: int) -> torch.Tensor:
        """[rows] float32, of the tokens drawn last: they tell hidden states apart where tokens do not."""
        return self.kernels._workspaces.sampling.logprobs[:rows]

    def tables(self, lengths: Sequence[int]) -> list[list[int]]:
        """Blocks for sequences of these lengths, none in two of them."""
        needed = [-(-length // self.cache.block_size) for length in lengths]
        if sum(needed) > self.cache.num_blocks:
            raise ValueError(f"{sum(needed)} blocks needed, the cache has {self.cache.num_blocks}")
        # Spread over the cache, as blocks are that other sequences have held before.
        order = torch.randperm(self.cache.num_blocks, generator=torch.Generator().manual_seed(0)).tolist()
        tables = []
        for need in needed:
            tables.append(order[:need])
            order = order[need:]
        return tables

    def graphs(self, sizes: Sequence[int], guess_sizes: Sequence[int] = ()) -> DecodeGraphs:
        """Decode steps of these batch sizes, and of these numbers of tokens with guesses among them.

        They are captured on a GPU, and made anew each time elsewhere.
        """
        graphs = DecodeGraphs(
            self.model,
            self.cache,
            self.kernels,
            sizes=sizes,
            guess_sizes=guess_sizes,
            max_model_len=self.limits.max_model_len,
        )
        if self.cache.device.type == "cuda":
            capture_all([graphs], GraphRecorder())
        return graphs

    def executor(self, sizes: Sequence[int]) -> FusedExecutor:
        """As a server starts it: with graphs of decode steps of these batch sizes, and what else it captures.

        It makes the kernels' buffers anew, so graphs that were captured before must not be replayed any more.
        """
        if self.cache.device.type == "cpu":
            # Padded steps with prompts take the interpreter long.
            executor = FusedExecutor(self.kernels).start(self.model, self.cache)
            executor.graphs = self.graphs(sizes)
            return executor
        executor = FusedExecutor(self.kernels, sizes)
        executor.reserve(self.limits)
        return executor.start(self.model, self.cache)

    def runner(self, graphs: DecodeGraphs | None) -> Runner:
        """What the engine calls."""
        executor = FusedExecutor(self.kernels).start(self.model, self.cache)
        executor.graphs = graphs
        return Runner(executor)


def decode_batch(
    lengths: Sequence[int],
    tables: Sequence[Sequence[int]],
    tokens: Sequence[int],
    sampling: RowSampling = GREEDY,
) -> list[SequenceInput]:
    """One new token a sequence, behind `length - 1` others."""
    return [
        SequenceInput(token_ids=[token], start=length - 1, block_table=table, samplings=(sampling,))
        for length, table, token in zip(lengths, tables, tokens, strict=True)
    ]
