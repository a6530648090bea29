"""The network as a program of native kernels: recorded once, then one call a step.

What CUDA graphs are on a GPU.  Knows nothing of sampling.
"""

import torch

from persimmon.kernels.cpu import library
from persimmon.kernels.cpu.native import (
    LAYER_BUFFER,
    RESIDUAL_BUFFER,
    NativeKernels,
    NativePlan,
    layer_width,
    step_of_plan,
)
from persimmon.kernels.cpu.program import Program
from persimmon.model.kv_cache import KVCache
from persimmon.model.persimmon import Persimmon, Step


class RecordedNetwork:
    """Runs `Persimmon.forward` on one cache.

    Args:
        model: the network, prepared for `kernels`.
        cache: its keys and values.
        kernels: record it.
        max_tokens: of a step; a larger one makes the buffers grow.

    Raises:
        ValueError: the network is one of several ranks', which sum in the middle of it: `RecordedShard` is for that.
    """

    def __init__(self, model: Persimmon, cache: KVCache, kernels: NativeKernels, max_tokens: int = 64) -> None:
        if model.ranks is not None:
            raise ValueError(
                "ranks that share this network sum between operations, and a recorded program runs them all in one "
                "call; use RecordedShard"
            )
        self._model = model
        self._cache = cache
        self._kernels = kernels
        self._record(max_tokens)

    @torch.inference_mode()
    def forward(self, step: Step) -> torch.Tensor:
        """As `Persimmon.forward`."""
        plan = step.attention
        if plan.num_tokens > self._program.max_tokens:
            self._record(grown(plan.num_tokens))
        rows = plan.num_tokens if step.logits_rows is None else len(step.logits_rows)
        program = self._program if 2 * rows > plan.num_tokens else self._program_of_rows
        width = self._model.config.hidden_size
        hidden = torch.empty(rows, width)
        native_step = step_of_plan(
            plan,
            step.rotary,
            token_ids=step.token_ids,
            sampled=step.sampled,
            rows=step.logits_rows,
            hidden=hidden,
        )
        if step.patches is not None:
            # In two calls, so that the embeddings can be changed between them.
            program.part(embeds).run(native_step)
            self._model.place_patches(program.buffer(RESIDUAL_BUFFER, width)[: plan.num_tokens], step.patches)
            program.part(lambda operation: not embeds(operation)).run(native_step)
        else:
            program.run(native_step)
        return hidden

    def _record(self, max_tokens: int) -> None:
        self._program = record(self._model, self._cache, self._kernels, max_tokens)
        layer = self._program.buffer(LAYER_BUFFER, width_of_layers(self._model))
        self._program_of_rows = self._program.of_wanted_rows(layer.view(-1))


def embeds(operation: library.Operation) -> bool:
    """Whether an operation looks embeddings up."""
    return bool(operation.kind == library.EMBED)


@torch.inference_mode()
def record(model: Persimmon, cache: KVCache, kernels: NativeKernels, max_tokens: int) -> Program:
    """The program of one pass of the network, for steps of up to `max_tokens` tokens."""
    nothing = torch.zeros(0, dtype=torch.int64)

    def forward(recorder: NativeKernels, plan: NativePlan) -> None:
        model.forward(Step(nothing, plan, None), cache, recorder)

    return kernels.record(max_tokens, forward, width_of_layers(model))


def width_of_layers(model: Persimmon) -> int:
    """As `layer_width`, of the part of the network that this rank has."""
    layer = model.layers[0]
    return layer_width(layer.attention_out.weight.shape[1], layer.mlp_up.weight.shape[0])


def grown(tokens: int) -> int:
    """Tokens to record a program for when a step has more than the last one: a power of two, so that it is seldom."""
    return 1 << (tokens - 1).bit_length()
