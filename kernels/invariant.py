"""The operations of a GPU in batch-invariant mode: a token's bits do not depend on what else its step computes.

Neither the number of rows, nor the other rows, nor how a prompt is cut into chunks, nor whether a token is part of a
prompt, decoded, or computed again after a preemption changes the order in which anything is added up.  For that,

- a product of more rows than `SMALL_STEP` is `invariant_projection`'s, with the summation order of `projection`'s; with
  quantized weights it is that of smaller steps, 256 rows at a time;
- attention is `invariant_attention`'s, for prompts and decodes;
- LayerNorms are always merged from their tiles' statistics, which travel with the residual stream in every step;
- logits of samples and of prompts are both added up as by the head kernel.

It assumes that the matrix units round alike at every tile width.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from persimmon.kernels import packed_projection, projection
from persimmon.kernels.chunk_plan import LastTokens, PrefillConfig
from persimmon.kernels.fused import FusedKernels, FusedPlan, angles_of, small_step
from persimmon.kernels.fused_weight import FusedWeight, GpuWeight, is_columns, operand_of
from persimmon.kernels.head import sample_head
from persimmon.kernels.invariant_attention import chunk_attention, config_of, decode_attention
from persimmon.kernels.invariant_projection import project_rows, project_rows_add_, row_statistics
from persimmon.kernels.layer_norm import layer_norm
from persimmon.kernels.operands import Activation, DrawInputs, LayerCache, Linear, Norm, Residual, Rotary
from persimmon.kernels.packed_weight import PackedWeight
from persimmon.kernels.prefill_attention import qk_norm_rotary_store


class InvariantKernels(FusedKernels):
    """`FusedKernels` whose results for a token depend only on that token and its sequence."""

    def norm_linear(self, x: Residual, norm: Norm, linear: Linear[GpuWeight], plan: FusedPlan) -> torch.Tensor:
        """As `reference.norm_linear`."""
        if len(x.values) <= small_step(linear.weight):
            return super().norm_linear(x, norm, linear, plan)
        normed, weight = self._normed(x, norm), linear.weight
        if isinstance(weight, PackedWeight):
            return self._packed_rows(normed, weight, linear.bias)
        return project_rows(normed, weight.matrix, linear.bias, config=projection.WIDE, pdl=self.pdl)

    def norm_linear_relu_squared(
        self, x: Residual, norm: Norm, linear: Linear[GpuWeight], plan: FusedPlan
    ) -> Activation:
        """As `reference.norm_linear_relu_squared`."""
        if len(x.values) <= small_step(linear.weight):
            return super().norm_linear_relu_squared(x, norm, linear, plan)
        normed, weight = self._normed(x, norm), linear.weight
        if isinstance(weight, PackedWeight):
            return Activation(self._packed_rows(normed, weight, linear.bias, activation="relu_squared"))
        values = project_rows(
            normed,
            weight.matrix,
            linear.bias,
            activation="relu_squared",
            config=projection.WIDE,
            pdl=self.pdl,
        )
        return Activation(values)

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
        """As `reference.attention`; the weight ahead is not fetched."""
        del ahead
        tokens, heads, _, dim = qkv.shape
        weight, bias, eps = (qk_norm.weight, qk_norm.bias, qk_norm.eps) if qk_norm else (None, None, 0.0)
        out = torch.empty(tokens, heads * dim, dtype=qkv.dtype, device=qkv.device)
        decodes = len(plan.lengths)
        if decodes:
            q = qk_norm_rotary_store(
                qkv[:decodes],
                weight,
                bias,
                eps,
                *angles_of(rotary, slice(decodes)),
                cache,
                LastTokens(plan.lengths, plan.block_tables),
                angles_by_row=rotary.by_token,
                exact=True,
                pdl=self.pdl,
            )
            decode_attention(
                q,
                cache,
                plan.lengths,
                plan.block_tables,
                self._workspaces.decode,
                out=out[:decodes],
                pdl=self.pdl,
            )
        if plan.chunks is not None:
            first = tokens - len(plan.chunks.slots)  # as in `FusedKernels.attention`
            q = qk_norm_rotary_store(
                qkv[first:],
                weight,
                bias,
                eps,
                *angles_of(rotary, slice(first, None)),
                cache,
                plan.chunks,
                angles_by_row=rotary.by_token,
                exact=True,
                pdl=self.pdl,
            )
            chunk_attention(q, cache, plan.chunks, out=out[first:], pdl=self.pdl)
        return out

    def product(self, inputs: Activation, linear: Linear[GpuWeight]) -> torch.Tensor:
        """As `reference.product`."""
        weight = linear.weight
        if isinstance(weight, PackedWeight):
            config = packed_projection.added_config(weight.packing)
            return self._packed_rows(inputs.values, weight, linear.bias, config=config)
        return project_rows(
            inputs.values,
            weight.matrix,
            linear.bias,
            transposed=is_columns(weight),
            config=_config_of(weight),
            pdl=self.pdl,
        )

    def add_(self, x: Residual, update: torch.Tensor, plan: FusedPlan) -> None:
        """As `reference.add_`."""
        del plan
        x.values += update
        x.statistics = row_statistics(x.values, pdl=self.pdl)

    def add_product_(self, x: Residual, inputs: Activation, linear: Linear[GpuWeight], plan: FusedPlan) -> None:
        """As `reference.add_product_`."""
        if len(x.values) <= small_step(linear.weight):
            super().add_product_(x, inputs, linear, plan)
            return
        weight = linear.weight
        if isinstance(weight, PackedWeight):
            workspace = self._workspaces.projection
            parts = [
                packed_projection.project_add_(
                    rows, given, weight, linear.bias, live=None, workspace=workspace, pdl=self.pdl
                )
                for rows, given in zip(_slices(x.values), _slices(inputs.values), strict=True)
            ]
            x.statistics = torch.cat(parts, dim=2)
            return
        x.statistics = project_rows_add_(
            x.values,
            inputs.values,
            weight.matrix,
            linear.bias,
            transposed=is_columns(weight),
            config=_config_of(weight),
            pdl=self.pdl,
        )

    def norm_rows(self, x: Residual, norm: Norm, rows: torch.Tensor | None) -> torch.Tensor:
        """As `reference.norm_rows`."""
        if rows is None:
            return self._normed(x, norm)
        statistics = self._statistics(x)[:, :, rows]
        return layer_norm(x.values[rows], statistics, norm.weight, norm.bias, norm.eps, pdl=self.pdl)

    def logits(self, hidden: torch.Tensor, head: GpuWeight, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """As `reference.logits`, with the bits that `sample` writes."""
        if isinstance(head, PackedWeight):
            logits = self._packed_rows(hidden, head, None, dtype=torch.float32)
            return logits if out is None else out.copy_(logits)
        return project_rows(
            hidden, head.matrix, None, config=projection.WIDE, out=out, dtype=torch.float32, pdl=self.pdl
        )

    def sample(
        self,
        hidden: torch.Tensor,
        head: GpuWeight,
        draw: DrawInputs,
        live: torch.Tensor,
        logits: torch.Tensor | None,
    ) -> torch.Tensor:
        """As `FusedKernels.sample`."""
        workspace = self._workspaces.sampling
        tokens, _ = sample_head(hidden, operand_of(head), draw, live, workspace, logits=logits, pdl=self.pdl)
        return tokens

    def chunk_configs(self, dtype: torch.dtype) -> Sequence[PrefillConfig]:
        """One shape, whatever a chunk's length."""
        return (config_of(dtype),)

    def _packed_rows(
        self,
        x: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        *,
        activation: Literal["none", "relu_squared"] = "none",
        config: packed_projection.PackedConfig | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Any number of rows, each with the bits of a small step: [M, in] to [M, out]."""
        parts = [
            packed_projection.project(
                rows,
                weight,
                bias,
                activation=activation,
                live=None,
                workspace=self._workspaces.projection,
                config=config,
                dtype=dtype,
                pdl=self.pdl,
            )[0]
            for rows in _slices(x)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _normed(self, x: Residual, norm: Norm) -> torch.Tensor:
        return layer_norm(x.values, self._statistics(x), norm.weight, norm.bias, norm.eps, pdl=self.pdl)

    def _statistics(self, x: Residual) -> torch.Tensor:
        """The stream's, made where the embeddings came from elsewhere than the table."""
        if x.statistics is None:
            x.statistics = row_statistics(x.values, pdl=self.pdl)
        return x.statistics


def _config_of(weight: FusedWeight) -> projection.ProjectionConfig:
    """How `FusedKernels.add_product_` splits the product."""
    return projection.MLP_DOWN if weight.format == "columns" else projection.ATTENTION_OUT


def _slices(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows that one launch takes at a time."""
    return torch.split(x, packed_projection.MAX_ROWS)
