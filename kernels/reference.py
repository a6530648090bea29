"""The network's operations in plain torch: the CPU path, and what every kernel is tested against.

Knows nothing of layers, requests or scheduling.  Everything is computed in float32 inside, whatever the dtype of
the tensors that come in and go out.  Shapes use T for the tokens of a step, H for heads, D for head_dim and R for
rotary dimensions.  Attention is in `reference_attention`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812

from persimmon.kernels.operands import Activation, LayerCache, Linear, Norm, Residual, Rotary, StepLimits, Weight
from persimmon.kernels.quantized import QuantizedFormat, QuantizedMatrix
from persimmon.kernels.reference_attention import AttentionPlan, paged_attention, qk_norm_rotary_store

# They are among the operations.
from persimmon.kernels.reference_attention import plan_attention as plan_attention
from persimmon.kernels.reference_attention import rotary_at as rotary_at


class ReferenceWeight(Weight, Protocol):
    """A weight in plain torch: what can be multiplied by, however its numbers are kept."""

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """X @ weight.T + bias: [T, in] and [out] or None to [T, out] in x's dtype."""
        ...


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """A weight as torch keeps it: [out, in]."""

    matrix: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self.matrix.nbytes

    @property
    def format(self) -> str:
        """Row by row."""
        return "rows"

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As `ReferenceWeight.multiply`."""
        return F.linear(x, self.matrix, bias)


@dataclass(frozen=True, slots=True)
class BlockedWeight:
    """A weight in oneDNN's blocks, laid out once instead of anew in every product."""

    packed: torch.Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.packed.dtype.itemsize

    @property
    def format(self) -> str:
        """OneDNN decides how they lie."""
        return "oneDNN blocks"

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As `ReferenceWeight.multiply`."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
        return out


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight as it is stored, which every product widens anew: a reference, and slow."""

    matrix: QuantizedMatrix

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.matrix.shape

    @property
    def nbytes(self) -> int:
        """Bytes of numbers and scales."""
        return self.matrix.nbytes

    @property
    def format(self) -> str:
        """As stored."""
        return str(self.matrix.format)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As `ReferenceWeight.multiply`: the product of x with the dequantized matrix in float32."""
        return F.linear(x.float(), self.matrix.dequantized(), None if bias is None else bias.float()).to(x.dtype)


def workspace_bytes(limits: StepLimits) -> int:
    """Bytes that `reserve` takes: none."""
    del limits
    return 0


def reserve(limits: StepLimits) -> None:
    """Makes the buffers that steps within these limits share; there are none here."""
    del limits


def stored_dtype(stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """What a matrix or an embedding stored in `stored` is kept in, where the network computes in `dtype`: that."""
    del stored
    return dtype


def cache_dtypes(dtype: torch.dtype) -> Sequence[torch.dtype]:
    """What `attention` can keep keys and values in, where the network computes in `dtype`; that comes first."""
    return (dtype, torch.int8)


def prepare_bias(bias: torch.Tensor) -> torch.Tensor:
    """The form of a projection's bias that is added fastest: as it is."""
    return bias


def prepare_weight(weight: torch.Tensor | QuantizedMatrix, *, sparse_input: bool = False) -> ReferenceWeight:
    """The matrix of a product in the format that is multiplied fastest; on a CPU, oneDNN's blocks, unless quantized.

    Args:
        weight: [out, in], in the dtype that `stored_dtype` says, or quantized.
        sparse_input: whether it is multiplied by squared ReLU, which is never negative and mostly zero; nothing is
            made of that here.
    """
    del sparse_input
    if isinstance(weight, QuantizedMatrix):
        return QuantizedWeight(weight)
    if weight.device.type == "cpu" and torch._C._has_mkldnn and _packs(weight.dtype):
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        return BlockedWeight(packed, (weight.shape[0], weight.shape[1]))
    return DenseWeight(weight)


def tied_weight(table: torch.Tensor | QuantizedMatrix) -> ReferenceWeight:
    """An embedding [vocab_size, hidden] as the matrix of the last product, without a copy."""
    return QuantizedWeight(table) if isinstance(table, QuantizedMatrix) else DenseWeight(table)


def tied_bytes(shape: tuple[int, int], stored: torch.dtype | QuantizedFormat) -> int:
    """Bytes that `tied_weight` takes beyond the table: none.

    Args:
        shape: (vocab_size, hidden).
        stored: the table's dtype or format.
    """
    del shape, stored
    return 0


def weight_bytes(shape: tuple[int, int], stored: torch.dtype | QuantizedFormat) -> int:
    """Bytes of what `prepare_weight` makes of a matrix.

    Args:
        shape: (out, in).
        stored: the dtype, or the format, of the matrix that it is given.
    """
    return stored.nbytes(shape) if isinstance(stored, QuantizedFormat) else math.prod(shape) * stored.itemsize


def _packs(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension.

    Args:
        x: [T, hidden].
        weight, bias: [hidden].
        eps: added to the biased variance.
    """
    if x.dtype == torch.float32:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2, in place where the dtype allows.

    float16 ends at 65,504, which a pre-activation of 256 passes: the square saturates there instead of becoming
    infinite, because one infinity turns the whole row into NaN at the next LayerNorm.
    """
    if x.dtype == torch.float16:
        return x.float().relu_().square_().clamp_(max=torch.finfo(torch.float16).max).to(x.dtype)
    return x.relu_().square_()


def embed(
    token_ids: torch.Tensor,
    sampled: torch.Tensor | None,
    table: torch.Tensor | QuantizedMatrix,
    plan: AttentionPlan,
) -> Residual:
    """The tokens' embeddings, where the residual stream begins.

    Args:
        token_ids: [T] int64.  A negative one, -1 - r, stands for `sampled[r]`: a step may begin before the tokens
            of the one before it are known to the host.
        sampled: [*] int64; None where no id is negative.
        table: [vocab_size, hidden]; embeddings have its dtype, or that of its scales where it is quantized.
        plan: the step's.
    """
    del plan
    if sampled is not None:
        token_ids = torch.where(token_ids < 0, sampled[(-1 - token_ids).clamp_min(0)], token_ids)
    if isinstance(table, QuantizedMatrix):
        numbers, scales = F.embedding(token_ids, table.numbers), F.embedding(token_ids, table.scales)
        rows = replace(table, numbers=numbers, scales=scales)
        return Residual(rows.dequantized().to(scales.dtype))
    return Residual(F.embedding(token_ids, table))


def norm_linear(x: Residual, norm: Norm, linear: Linear[ReferenceWeight], plan: AttentionPlan) -> torch.Tensor:
    """LayerNorm, then a projection: [T, out]."""
    del plan
    return project(layer_norm(x.values, norm.weight, norm.bias, norm.eps), linear)


def attention(
    qkv: torch.Tensor,
    qk_norm: Norm | None,
    rotary: Rotary,
    cache: LayerCache,
    plan: AttentionPlan,
    *,
    ahead: Linear[ReferenceWeight] | None = None,
) -> torch.Tensor:
    """QK-norm, rotary embedding, keys and values into the cache, and attention over it.

    Args:
        qkv: [T, H, 3, D], the fused projection as it comes: per head its query, key and value.
        qk_norm: [2, D] each, or None where the model has none.
        rotary: what `rotary_at` made for this step.
        cache: the layer's; the step's keys and values are written to it.
        plan: the step's.
        ahead: the projection that comes next, for kernels that can begin to fetch its weight.

    Returns:
        [T, H * D].
    """
    del ahead
    weight, bias, eps = (qk_norm.weight, qk_norm.bias, qk_norm.eps) if qk_norm else (None, None, 0.0)
    cos, sin = rotary.cos[:, None, None], rotary.sin[:, None, None]
    q = qk_norm_rotary_store(qkv, weight, bias, eps, cos, sin, cache, plan)
    return paged_attention(q, cache, plan)


def norm_linear_relu_squared(
    x: Residual, norm: Norm, linear: Linear[ReferenceWeight], plan: AttentionPlan
) -> Activation:
    """The first half of the MLP: relu(linear(norm(x)))^2, [T, out]."""
    return Activation(relu_squared(norm_linear(x, norm, linear, plan)))


def product(inputs: Activation, linear: Linear[ReferenceWeight]) -> torch.Tensor:
    """What this rank has of a product that goes into the residual stream, of any number of rows.

    Ranks that share a network have some input columns of the weight each, and one of them has the bias, so the product
    is the sum over all ranks.  One rank has it whole.

    Args:
        inputs: [T, in] of these columns.
        linear: the weight of these columns, and the bias or None.

    Returns:
        [T, out] in the dtype of the inputs.
    """
    return project(inputs.values, linear)


def add_(x: Residual, update: torch.Tensor, plan: AttentionPlan) -> None:
    """Adds a product [T, hidden], summed over all ranks, to the residual stream, and its statistics with it."""
    del plan
    x.values += update


def add_product_(x: Residual, inputs: Activation, linear: Linear[ReferenceWeight], plan: AttentionPlan) -> None:
    """`product`, then `add_`: what one rank does, which kernels may do in one launch."""
    add_(x, product(inputs, linear), plan)


def norm_rows(x: Residual, norm: Norm, rows: torch.Tensor | None) -> torch.Tensor:
    """LayerNorm of some rows of the residual stream.

    Args:
        x: the residual stream.
        norm: the LayerNorm.
        rows: [R] int64, or None for all.

    Returns:
        [R, hidden].
    """
    values = x.values if rows is None else x.values[rows]
    return layer_norm(values, norm.weight, norm.bias, norm.eps)


def logits(hidden: torch.Tensor, head: ReferenceWeight) -> torch.Tensor:
    """[R, vocab_size] float32: hidden [R, hidden] times head, of shape (vocab_size, hidden)."""
    return head.multiply(hidden, None).float()


def project(x: torch.Tensor, by: Linear[ReferenceWeight]) -> torch.Tensor:
    """X @ weight.T + bias: [T, in] to [T, out] in x's dtype."""
    return by.weight.multiply(x, by.bias)
