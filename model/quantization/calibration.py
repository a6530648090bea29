"""Layers of a network become quantized one after the other, each on what the quantized ones before it make of text.

The network is computed in float32 by plain torch, operation by operation.  Knows no files.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from persimmon.kernels import LayerCache, Linear, Norm, QuantizedFormat, QuantizedMatrix, reference
from persimmon.model.config import PersimmonConfig
from persimmon.model.errors import CheckpointError
from persimmon.model.quantization.gptq import Hessian, quantize
from persimmon.model.rotary import rotary_of_tokens

MAX_STEP = 2048
"""Tokens that are computed at once: of the inputs of a layer's last matrix, 128 MiB in float32 for the 8B model."""

_BLOCK_SIZE = 16
_CPU = torch.device("cpu")

Load = Callable[[str], torch.Tensor]
"""A tensor of one layer by its name within it, like "mlp.dense_4h_to_h.weight"."""


@dataclass(frozen=True)
class _Batch:
    """Neighbouring texts that are computed in one step.

    Attributes:
        tokens: the slice of the hidden states that is theirs.
        lengths: of each text.
    """

    tokens: slice
    lengths: tuple[int, ...]


class Calibration:
    """The hidden states of texts, which pass through one layer after the other.

    They take tokens * hidden_size floats, and another such number while a layer is quantized: 2 GiB for 65,536 tokens
    of the 8B model.  Besides, a layer takes its weights in float32, and its largest Hessian three times, 3 GiB.

    Args:
        config: the network.
        lengths: tokens of each text, at most MAX_STEP.
        hidden: [sum of lengths, hidden_size] float32, what the first layer gets, or the next one; changed in place.
    """

    def __init__(self, config: PersimmonConfig, lengths: Sequence[int], hidden: torch.Tensor) -> None:
        self.config = config
        self.hidden = hidden
        self._batches = list(_batches(lengths))

    @torch.inference_mode()
    def quantize_layer(self, load: Load, forms: Mapping[str, QuantizedFormat]) -> dict[str, QuantizedMatrix]:
        """Quantizes the matrices of the next layer, and passes the hidden states through it.

        Each matrix sees the inputs that the quantized ones before it make.

        Args:
            load: the layer's tensors.
            forms: of each of its matrices, by name.

        Raises:
            CheckpointError: a weight or an input is not finite, or a weight too large for its scale.
        """
        matrices: dict[str, QuantizedMatrix] = {}
        config, heads, head_dim = self.config, self.config.num_attention_heads, self.config.head_dim

        def norm(name: str) -> Norm:
            return Norm(load(f"{name}.weight").float(), load(f"{name}.bias").float(), config.layer_norm_eps)

        def linear(name: str, inputs: Callable[[_Batch], torch.Tensor]) -> Linear[reference.ReferenceWeight]:
            """Quantizes a matrix on the inputs of all texts."""
            weight = load(f"{name}.weight")
            hessian = Hessian(weight.shape[1])
            for batch in self._batches:
                hessian.add(inputs(batch))
            try:
                matrix = quantize(weight, hessian.take(), forms[f"{name}.weight"])
            except CheckpointError as error:
                raise CheckpointError(f"{name}.weight: {error}") from error
            matrices[f"{name}.weight"] = matrix
            return Linear(reference.prepare_weight(matrix.dequantized()), load(f"{name}.bias").float())

        before_attention, before_mlp = norm("input_layernorm"), norm("post_attention_layernorm")
        qk_norm = None
        if config.qk_layernorm:
            query, key = norm("self_attn.q_layernorm"), norm("self_attn.k_layernorm")
            qk_norm = Norm(
                torch.stack((query.weight, key.weight)), torch.stack((query.bias, key.bias)), config.layer_norm_eps
            )
        qkv = linear("self_attn.query_key_value", lambda batch: self._normed(batch, before_attention))
        attended = torch.empty_like(self.hidden)
        cache = self._cache()
        for batch in self._batches:
            projected = reference.project(self._normed(batch, before_attention), qkv).view(-1, heads, 3, head_dim)
            attended[batch.tokens] = self._attention(batch, projected, qk_norm, cache)
        out = linear("self_attn.dense", lambda batch: attended[batch.tokens])
        for batch in self._batches:
            self.hidden[batch.tokens] += reference.project(attended[batch.tokens], out)
        up = linear("mlp.dense_h_to_4h", lambda batch: self._normed(batch, before_mlp))

        def inner(batch: _Batch) -> torch.Tensor:
            return reference.relu_squared(reference.project(self._normed(batch, before_mlp), up))

        down = linear("mlp.dense_4h_to_h", inner)
        for batch in self._batches:
            self.hidden[batch.tokens] += reference.project(inner(batch), down)
        return matrices

    def _normed(self, batch: _Batch, norm: Norm) -> torch.Tensor:
        return reference.layer_norm(self.hidden[batch.tokens], norm.weight, norm.bias, norm.eps)

    def _cache(self) -> LayerCache:
        """Of one layer, and large enough for any batch."""
        blocks = max(sum(map(_blocks, batch.lengths)) for batch in self._batches)
        shape = (blocks, self.config.num_attention_heads, _BLOCK_SIZE, self.config.head_dim)
        return LayerCache(keys=torch.empty(shape), values=torch.empty(shape))

    def _attention(self, batch: _Batch, qkv: torch.Tensor, qk_norm: Norm | None, cache: LayerCache) -> torch.Tensor:
        ends = list(itertools.accumulate(map(_blocks, batch.lengths)))
        plan = reference.plan_attention(
            [range(end - _blocks(length), end) for end, length in zip(ends, batch.lengths, strict=True)],
            [0] * len(ends),
            batch.lengths,
            num_blocks=cache.keys.shape[0],
            num_heads=self.config.num_attention_heads,
            block_size=_BLOCK_SIZE,
            dtype=torch.float32,
            device=_CPU,
        )
        lengths = torch.tensor(batch.lengths).repeat_interleave(torch.tensor(batch.lengths))
        rotary = rotary_of_tokens(self.config, plan.positions, lengths, _CPU)
        return reference.attention(qkv, qk_norm, rotary, cache, plan)


def _blocks(length: int) -> int:
    return -(-length // _BLOCK_SIZE)


def _batches(lengths: Sequence[int]) -> Iterator[_Batch]:
    """As many neighbouring texts as a step takes.

    Raises:
        ValueError: a text has one token only, or more than a step.
    """
    start, batch = 0, list[int]()
    for length in lengths:
        if not 1 < length <= MAX_STEP:
            raise ValueError(f"a text has {length} tokens; expected 2 to {MAX_STEP}")
        if sum(batch) + length > MAX_STEP:
            yield _Batch(slice(start, start + sum(batch)), tuple(batch))
            start, batch = start + sum(batch), []
        batch.append(length)
    if batch:
        yield _Batch(slice(start, start + sum(batch)), tuple(batch))
