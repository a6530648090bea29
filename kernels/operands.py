"""What the operations take: tensors that belong together.  Knows no operation."""

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Linear:
    """A projection: weight as `Kernels.prepare_weight` made it of [out, in], bias [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Rotary:
    """Cosine and sine of position * theta^(-2i/R), each [max_position_embeddings, R/2] float32."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(slots=True)
class Residual:
    """The residual stream of a step's T tokens; what is beside `values` is for the kernels that put it there.

    Attributes:
        values: [T, hidden], changed in place by every block.
        statistics: what the rows' LayerNorms need, when the kernel that wrote `values` has made it; see
            `kernels.layer_norm`.
        pending: [T, hidden] still to be added to `values`, which the next LayerNorm does in passing.
    """

    values: torch.Tensor
    statistics: torch.Tensor | None = None
    pending: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step there will be, and the network's widths: what buffers are made for.

    Attributes:
        max_num_seqs: most sequences of a step.
        max_model_len: most tokens of a sequence.
        num_heads, head_dim, hidden_size, intermediate_size, vocab_size: the network's.
    """

    max_num_seqs: int
    max_model_len: int
    num_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
