"""What the operations take: tensors that belong together.  Knows no operation."""

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch


@dataclass(frozen=True, slots=True)
class Norm:
    """A LayerNorm.

    Attributes:
        weight, bias: [hidden]; of a QK-norm [2, head_dim], the query's first.
        eps: added to the variance.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


class Weight(Protocol):
    """The [out, in] matrix of a product, in a format of the kernels that made it.

    Only these kernels read its numbers, and scales where the format has them.  Everything else sees what is here.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes, scales included."""
        ...

    @property
    def format(self) -> str:
        """How its numbers lie, in the kernels' words."""
        ...


W = TypeVar("W", bound=Weight)


@dataclass(frozen=True, slots=True)
class Linear(Generic[W]):
    """A projection: its weight, and its bias as `Kernels.prepare_bias` made it of [out], or None."""

    weight: W
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Activation:
    """What a product multiplies.

    Attributes:
        values: [T, in].
        alive: [in] int8, zero where every row has a zero, when the kernel that wrote `values` has looked.
    """

    values: torch.Tensor
    alive: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rotary:
    """Cosines and sines of the angles by which the rotary embedding turns: position * frequency.

    Attributes:
        cos, sin: [P, R/2] float32, a row for each position; with `by_token` [T, R/2], a row for each token of the step.
        by_token: whether rows are a step's tokens'.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    by_token: bool = False


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer, in blocks; passed whole, since only kernels know how they lie in it.

    Attributes:
        keys, values: [N, H, S, D] of N blocks of S tokens, H heads and head_dim D; of 8 bits, int8 or float8_e4m3fn.
        scales: [N, H, S, 2] bfloat16, what int8 numbers are multiplied by: of each token its key's and its value's, so
            that a GPU loads both as one word; None for other types.
    """

    keys: torch.Tensor
    values: torch.Tensor
    scales: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of them, each with N blocks: what copying a block copies."""
        return (self.keys, self.values) if self.scales is None else (self.keys, self.values, self.scales)

    @property
    def block_size(self) -> int:
        """S."""
        return self.keys.shape[2]


@dataclass(slots=True)
class Residual:
    """The residual stream of a step's T tokens; everything but `values` is only for the kernels that wrote it.

    Attributes:
        values: [T, hidden], changed in place by every block.
        statistics: what the rows' LayerNorms need, when the kernel that wrote `values` has made it; see
            `persimmon.kernels.layer_norm`.
        pending: [T, hidden] still to be added to `values`, which the next LayerNorm does in passing.
    """

    values: torch.Tensor
    statistics: torch.Tensor | None = None
    pending: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step there will be, and the network's widths: what buffers are made for.

    Attributes:
        max_num_seqs: maximum sequences of a step.
        max_num_batched_tokens: maximum tokens of a step.
        max_model_len: maximum tokens of a sequence.
        num_heads, head_dim, hidden_size, intermediate_size, vocab_size: the network's.
        quantized: whether matrices of products are.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    quantized: bool = False


@dataclass(frozen=True, slots=True)
class DrawInputs:
    """How each row draws; static device tensors of one entry a row, so that a CUDA graph can hold their addresses.

    Attributes:
        temperature: [R] float32; 0 takes the most probable token, the lowest id among equals.
        seed: [R] int64, 0 <= seed < 2**63.
        sample_index: [R] int32, which of a request's samples this is.
        position: [R] int32, the place of the token to be sampled in the sequence's output.
        wants_logits: [R] int32, non-zero where the row's logits have to be written out.
    """

    temperature: torch.Tensor
    seed: torch.Tensor
    sample_index: torch.Tensor
    position: torch.Tensor
    wants_logits: torch.Tensor


@dataclass(frozen=True, slots=True)
class TruncationInputs:
    """Which rows are drawn anew from their logits, and from how many tokens; static device tensors.

    Attributes:
        active: [R] int32, zero where a row's token must not change.
        top_k: [R] int32, keeps this many of the most probable tokens; 0 keeps all.
        top_p: [R] float32, keeps the most probable tokens until their probabilities sum to this; 1 keeps all.
        min_p: [R] float32, drops tokens less probable than this share of the most probable one; 0 keeps all.
    """

    active: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor


@dataclass(frozen=True, slots=True)
class PenaltyInputs:
    """What each row has seen, in compressed sparse rows, and what that costs; static device tensors.

    Attributes:
        offsets: [R + 1] int32; row r's entries are offsets[r] to offsets[r + 1].
        token_ids: [E] int32, each id at most once in a row.
        output_counts: [E] int32, how often the row's output holds the id; 0 where only its prompt does.
        repetition: [R] float32, divides positive and multiplies negative logits of all entries; 1 does nothing.
        frequency: [R] float32, taken off once for each time the output holds the id.
        presence: [R] float32, taken off once if the output holds the id at all.
    """

    offsets: torch.Tensor
    token_ids: torch.Tensor
    output_counts: torch.Tensor
    repetition: torch.Tensor
    frequency: torch.Tensor
    presence: torch.Tensor
