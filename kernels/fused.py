"""The network's operations on a GPU: fused Triton kernels where memory is the limit, cuBLAS where arithmetic is.

Shapes, dtypes and maths are those of `persimmon.kernels.reference`.  Which way a step takes depends only on its number
of tokens.  A few tokens, up to `SMALL_STEP`: five launches a layer, each weight read once, LayerNorms from statistics
that travel with the residual stream, MLP rows that meet only zeros not read at all.  More: cuBLAS between elementwise
kernels.
Attention is one launch for sequences with one token and two for chunks, either way.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from persimmon.kernels import packed_projection, projection, sampling, truncation
from persimmon.kernels.chunk_plan import prefill_configs
from persimmon.kernels.decode_attention import decode_attention
from persimmon.kernels.decode_work import build_work_list
from persimmon.kernels.fused_weight import (
    DequantizingBuffer,
    FusedWeight,
    GpuWeight,
    float32_product,
    is_columns,
    numbers_of,
    operand_of,
)
from persimmon.kernels.head import sample_head
from persimmon.kernels.launch import converts_fp8, generation, upload
from persimmon.kernels.layer_norm import bias_relu_squared_, embed, layer_norm
from persimmon.kernels.operands import (
    Activation,
    DrawInputs,
    LayerCache,
    Linear,
    Norm,
    PenaltyInputs,
    Residual,
    Rotary,
    StepLimits,
    TruncationInputs,
)
from persimmon.kernels.packed_weight import PackedWeight, Packing, pack
from persimmon.kernels.prefill_attention import (
    ChunkPlan,
    PrefillConfig,
    plan_chunks,
    prefill_attention,
    qk_norm_rotary_store,
)
from persimmon.kernels.quantized import QuantizedFormat, QuantizedMatrix
from persimmon.kernels.workspaces import Workspaces

SMALL_STEP = 64
"""Most tokens of a step whose projections read weights rather than multiply; not yet run on a GPU."""

PACKED_STEP = packed_projection.MAX_ROWS
"""The same with quantized weights, which larger steps dequantize first: that writes more bytes than 16-bit weights
have, while rows of 64 unpack what the L2 cache still holds; not yet run on a GPU."""

SPARSE_STEP = 16
"""Most tokens of a step that skips MLP rows: of more tokens hardly a row is zero for all; not yet run on a GPU."""


@dataclass(frozen=True, slots=True)
class FusedPlan:
    """A step's tokens: first those of sequences with one each, then chunks.

    Attributes:
        live: [1] int32, tokens that are not padding.
        lengths: [B] int32, context of each single token, itself included; 0 for padding.
        block_tables: [B, W] int32, of the sequences with one token.
        chunks: all others; or every token of the step, those without a chunk having no slot.
        shared: whether single tokens may be of one sequence, one after the other, as its last known token and guesses.
    """

    live: torch.Tensor
    lengths: torch.Tensor
    block_tables: torch.Tensor
    chunks: ChunkPlan | None = None
    shared: bool = False


class FusedKernels:
    """The operations, and the buffers that launches share.

    Args:
        device: a GPU; or a CPU, where Triton interprets.
        pdl: whether a kernel may start while the one before it ends (programmatic dependent launch, sm_90 and later).
            Not yet run on a GPU, and so not the default.
        sparse_step: maximum tokens of a step that skips MLP rows.
    """

    def __init__(self, device: torch.device, *, pdl: bool = False, sparse_step: int = SPARSE_STEP) -> None:
        self.device = device
        self.pdl = pdl
        self.sparse_step = sparse_step
        self._reserved: Workspaces | None = None

    def workspace_bytes(self, limits: StepLimits) -> int:
        """Bytes that `reserve` takes."""
        return Workspaces.bytes(limits, SMALL_STEP)

    def reserve(self, limits: StepLimits) -> None:
        """Makes the buffers that steps within these limits share, one after the other."""
        self._reserved = Workspaces.allocate(limits, SMALL_STEP, self.device)

    def stored_dtype(self, stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
        """As `reference.stored_dtype`."""
        del stored
        return dtype

    def cache_dtypes(self, dtype: torch.dtype) -> Sequence[torch.dtype]:
        """As `reference.cache_dtypes`: 8 bits for a network of 16, float8_e4m3fn where the GPU converts it."""
        if dtype.itemsize != 2:  # tiles of pages are for 16-bit queries
            return (dtype,)
        return (dtype, torch.int8, *([torch.float8_e4m3fn] if converts_fp8(self.device) else []))

    def prepare_bias(self, bias: torch.Tensor) -> torch.Tensor:
        """As it is."""
        return bias

    def prepare_weight(self, weight: torch.Tensor | QuantizedMatrix, *, sparse_input: bool = False) -> GpuWeight:
        """[out, in] as it is, or turned where the input is sparse; a quantized one packed for this GPU.

        Raises:
            ValueError: it is quantized in groups that have no layout.
        """
        if isinstance(weight, QuantizedMatrix):
            return pack(weight, columns=sparse_input, generation=generation(self.device))
        return FusedWeight(weight.t().contiguous(), "columns") if sparse_input else FusedWeight(weight)

    def tied_weight(self, table: torch.Tensor | QuantizedMatrix) -> GpuWeight:
        """As `reference.tied_weight`; of a quantized table a packed copy, since rows are looked up in the table."""
        return self.prepare_weight(table)

    def tied_bytes(self, shape: tuple[int, int], stored: torch.dtype | QuantizedFormat) -> int:
        """As `reference.tied_bytes`."""
        return self.weight_bytes(shape, stored) if isinstance(stored, QuantizedFormat) else 0

    def weight_bytes(self, shape: tuple[int, int], stored: torch.dtype | QuantizedFormat) -> int:
        """As `reference.weight_bytes`; which inputs are sparse does not change it.

        Raises:
            ValueError: it is quantized in groups that have no layout.
        """
        if isinstance(stored, QuantizedFormat):
            return Packing.of(stored, columns=False).nbytes(shape)
        return math.prod(shape) * stored.itemsize

    def plan_attention(
        self,
        block_tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        counts: Sequence[int],
        *,
        num_blocks: int,
        num_heads: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> FusedPlan:
        """As `reference.plan_attention`: sequences with a single token come first."""
        del num_blocks, num_heads
        decodes = next((i for i, count in enumerate(counts) if count != 1), len(counts))
        width = max((len(table) for table in block_tables[:decodes]), default=0)
        # One transfer: the number of tokens, lengths from the next 16 bytes on, tables from the next after them.
        tables_at = 4 + -(-decodes // 4) * 4
        words = np.zeros(tables_at + decodes * width, dtype=np.int32)
        words[0] = sum(counts)
        words[4 : 4 + decodes] = [start + 1 for start in starts[:decodes]]
        rows = words[tables_at:].reshape(decodes, width)
        for row, table in zip(rows, block_tables[:decodes], strict=True):
            row[: len(table)] = table
        packed = upload(words, device)
        chunks = None
        if decodes < len(counts):
            chunks = plan_chunks(
                block_tables[decodes:],
                starts[decodes:],
                counts[decodes:],
                block_size=block_size,
                device=device,
                dtype=dtype,
                configs=self.chunk_configs(dtype),
            )
        return self.plan_decode(packed[:1], packed[4 : 4 + decodes], packed[tables_at:].view(decodes, width), chunks)

    def plan_decode(
        self,
        live: torch.Tensor,
        lengths: torch.Tensor,
        block_tables: torch.Tensor,
        chunks: ChunkPlan | None = None,
        *,
        shared: bool = False,
    ) -> FusedPlan:
        """A plan from what is on the device already; launches the kernel that makes the step's work list."""
        if len(lengths):
            build_work_list(lengths, self._workspaces.decode, pdl=self.pdl)
        return FusedPlan(live=live, lengths=lengths, block_tables=block_tables, chunks=chunks, shared=shared)

    def rotary_at(self, table: Rotary, plan: FusedPlan) -> Rotary:
        """The whole table: kernels look their tokens' positions up themselves."""
        del plan
        return table

    def embed(
        self,
        token_ids: torch.Tensor,
        sampled: torch.Tensor | None,
        table: torch.Tensor | QuantizedMatrix,
        plan: FusedPlan,
    ) -> Residual:
        """As `reference.embed`, with the LayerNorm statistics of what it writes."""
        values, statistics = embed(token_ids, sampled, table, plan.live, pdl=self.pdl)
        return Residual(values, statistics)

    def norm_linear(self, x: Residual, norm: Norm, linear: Linear[GpuWeight], plan: FusedPlan) -> torch.Tensor:
        """As `reference.norm_linear`."""
        if len(x.values) > small_step(linear.weight):
            return self._linear(self._normed(x, norm), linear)
        out, _ = self._project_normed(x, norm, linear, plan, "none")
        return out

    def norm_linear_relu_squared(
        self, x: Residual, norm: Norm, linear: Linear[GpuWeight], plan: FusedPlan
    ) -> Activation:
        """As `reference.norm_linear_relu_squared`; of a small step it says which neurons are zero in all rows."""
        if len(x.values) > small_step(linear.weight):
            values = self._linear(self._normed(x, norm), linear)
            bias_relu_squared_(values, None, pdl=self.pdl)
            return Activation(values)
        return Activation(*self._project_normed(x, norm, linear, plan, "relu_squared"))

    def attention(
        self,
        qkv: torch.Tensor,
        qk_norm: Norm | None,
        rotary: Rotary,
        cache: LayerCache,
        plan: FusedPlan,
        *,
        ahead: Linear[GpuWeight] | None = None,
    ) -> torch.Tensor:
        """As `reference.attention`."""
        tokens, heads, _, dim = qkv.shape
        weight, bias, eps = (qk_norm.weight, qk_norm.bias, qk_norm.eps) if qk_norm else (None, None, 0.0)
        out = torch.empty(tokens, heads * dim, dtype=qkv.dtype, device=qkv.device)
        decodes = len(plan.lengths)
        if decodes:
            decode_attention(
                qkv[:decodes],
                weight,
                bias,
                eps,
                *angles_of(rotary, slice(decodes)),
                cache,
                plan.lengths,
                plan.block_tables,
                self._workspaces.decode,
                out=out[:decodes],
                angles_by_row=rotary.by_token,
                ahead=None if ahead is None or plan.chunks is not None else numbers_of(ahead.weight),
                shared=plan.shared,
                pdl=self.pdl,
            )
        if plan.chunks is not None:
            # On fixed buffers the plan has all tokens, because how many are decodes changes from step to step.
            first = tokens - len(plan.chunks.slots)
            q = qk_norm_rotary_store(
                qkv[first:],
                weight,
                bias,
                eps,
                *angles_of(rotary, slice(first, None)),
                cache,
                plan.chunks,
                angles_by_row=rotary.by_token,
                pdl=self.pdl,
            )
            prefill_attention(q, cache, plan.chunks, out=out[first:], pdl=self.pdl)
        return out

    def product(self, inputs: Activation, linear: Linear[GpuWeight]) -> torch.Tensor:
        """As `reference.product`."""
        return self._linear(inputs.values, linear)

    def add_(self, x: Residual, update: torch.Tensor, plan: FusedPlan) -> None:
        """As `reference.add_`; the next LayerNorm does it in passing, and reads rows instead of their statistics."""
        del plan
        x.pending, x.statistics = update, None

    def add_product_(self, x: Residual, inputs: Activation, linear: Linear[GpuWeight], plan: FusedPlan) -> None:
        """As `reference.add_product_`; of a small step in one launch, which also makes the statistics."""
        values, weight = inputs.values, linear.weight
        if len(values) > small_step(weight):
            self.add_(x, self.product(inputs, linear), plan)
            return
        columns = is_columns(weight)
        alive = inputs.alive if columns and len(values) <= self.sparse_step else None
        workspace = self._workspaces.projection
        if isinstance(weight, PackedWeight):
            x.statistics = packed_projection.project_add_(
                x.values, values, weight, linear.bias, alive=alive, live=plan.live, workspace=workspace, pdl=self.pdl
            )
            return
        x.statistics = projection.project_add_(
            x.values,
            values,
            weight.matrix,
            linear.bias,
            transposed=columns,
            alive=alive,
            live=plan.live,
            workspace=workspace,
            config=projection.MLP_DOWN if columns else projection.ATTENTION_OUT,
            pdl=self.pdl,
        )

    def norm_rows(self, x: Residual, norm: Norm, rows: torch.Tensor | None) -> torch.Tensor:
        """As `reference.norm_rows`."""
        if rows is None:
            return self._normed(x, norm)
        return self._normed(
            Residual(
                x.values[rows],
                # The same way whatever the rows: a token has the same bits in steps with and without prompts.
                statistics=None if x.statistics is None else x.statistics[:, :, rows],
                pending=None if x.pending is None else x.pending[rows],
            ),
            norm,
        )

    def logits(self, hidden: torch.Tensor, head: GpuWeight, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """As `reference.logits`, never rounded to 16 bits; written to `out` [R, vocab_size] float32 if given."""
        if isinstance(head, PackedWeight):
            return self._dequantized.logits(hidden, head, out)
        return float32_product(hidden, head.rows.t(), out)

    def sample(
        self,
        hidden: torch.Tensor,
        head: GpuWeight,
        draw: DrawInputs,
        live: torch.Tensor,
        logits: torch.Tensor | None,
    ) -> torch.Tensor:
        """A token a row, by `reference_sampling.sample`'s rule.

        Args:
            hidden: [R, hidden], the final LayerNorm's output.
            head: of shape (vocab_size, hidden).
            draw: how each row draws.
            live: [1] int32, rows that are not padding.
            logits: [R, vocab_size] float32, written for rows that want theirs; None when none does.

        Returns:
            [R] int64, the first of `sampled`.
        """
        if len(hidden) <= small_step(head):
            workspace = self._workspaces.sampling
            tokens, _ = sample_head(hidden, operand_of(head), draw, live, workspace, logits=logits, pdl=self.pdl)
            return tokens
        return self.sample_logits(self.logits(hidden, head, out=logits), draw, live)

    def sample_logits(self, logits: torch.Tensor, draw: DrawInputs, live: torch.Tensor) -> torch.Tensor:
        """As `sample`, from logits that are there already: [R, vocab_size] float32."""
        tokens, _ = sampling.sample_logits(logits, draw, live, self._workspaces.sampling, pdl=self.pdl)
        return tokens

    def penalize(self, logits: torch.Tensor, penalties: PenaltyInputs) -> None:
        """As `reference_sampling.apply_penalties`: [R, vocab_size] float32 logits, changed in place."""
        live = upload(np.array([len(logits)], dtype=np.int32), logits.device)
        truncation.apply_penalties(logits, penalties, live, pdl=self.pdl)

    def sample_truncated(
        self, logits: torch.Tensor, draw: DrawInputs, truncate: TruncationInputs, live: torch.Tensor
    ) -> torch.Tensor:
        """Draws the active rows of a step anew, after `sample`, from the tokens that top-k, top-p and min-p keep.

        Args:
            logits: [R, vocab_size] float32, as `sample` wrote them.
            draw: how each row draws.
            truncate: which rows, and from which tokens.
            live: [1] int32, rows that are not padding.

        Returns:
            [R] int64, the first of `sampled`; other rows keep their token.
        """
        workspaces = self._workspaces
        tokens, _ = truncation.sample_truncated(
            logits, draw, truncate, live, workspaces.sampling, workspaces.truncation, pdl=self.pdl
        )
        return tokens

    @property
    def sampled(self) -> torch.Tensor:
        """[max_num_seqs] int64, the tokens of the last step, where the next may take them from."""
        return self._workspaces.sampling.tokens

    def chunk_configs(self, dtype: torch.dtype) -> Sequence[PrefillConfig]:
        """Tile shapes of prompt attention over a cache of this type, as `lay_out_chunks` takes them."""
        return prefill_configs(dtype)

    def _project_normed(
        self,
        x: Residual,
        norm: Norm,
        linear: Linear[GpuWeight],
        plan: FusedPlan,
        activation: Literal["none", "relu_squared"],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A small step's projection of the normed stream; without statistics the norm is a launch of its own."""
        inputs, by = x.values, None
        if x.statistics is None:
            inputs = self._normed(x, norm)
        else:
            by = projection.Norm(statistics=x.statistics, weight=norm.weight, bias=norm.bias, eps=norm.eps)
        weight, workspace = linear.weight, self._workspaces.projection
        if isinstance(weight, PackedWeight):
            return packed_projection.project(
                inputs,
                weight,
                linear.bias,
                norm=by,
                activation=activation,
                live=plan.live,
                workspace=workspace,
                pdl=self.pdl,
            )
        return projection.project(
            inputs,
            weight.matrix,
            linear.bias,
            norm=by,
            activation=activation,
            live=plan.live,
            workspace=workspace,
            pdl=self.pdl,
        )

    def _linear(self, x: torch.Tensor, linear: Linear[GpuWeight]) -> torch.Tensor:
        """X @ weight.T + bias by cuBLAS."""
        if isinstance(linear.weight, PackedWeight):
            return self._dequantized.linear(x, linear.weight, linear.bias)
        return torch.nn.functional.linear(x, linear.weight.rows, linear.bias)

    def _normed(self, x: Residual, norm: Norm) -> torch.Tensor:
        """LayerNorm of the whole stream, after adding what is pending."""
        statistics = None if x.pending is not None else x.statistics
        normed = layer_norm(x.values, statistics, norm.weight, norm.bias, norm.eps, residual=x.pending, pdl=self.pdl)
        if x.pending is not None:
            x.pending = x.statistics = None
        return normed

    @property
    def _dequantized(self) -> DequantizingBuffer:
        buffer = self._workspaces.dequantized
        if buffer is None:
            raise RuntimeError("limits.quantized was false: no buffer was reserved for quantized weights")
        return buffer

    @property
    def _workspaces(self) -> Workspaces:
        if self._reserved is None:
            raise RuntimeError("reserve() comes before the first step: no buffers have been made")
        return self._reserved


def angles_of(rotary: Rotary, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for some of a step's rows: theirs, or those of all positions."""
    return (rotary.cos[rows], rotary.sin[rows]) if rotary.by_token else (rotary.cos, rotary.sin)


def small_step(weight: GpuWeight) -> int:
    """Most tokens of a step whose product with this weight reads it as it is stored."""
    return PACKED_STEP if isinstance(weight, PackedWeight) else SMALL_STEP
