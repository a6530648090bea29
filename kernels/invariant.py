"""The operations of a GPU in batch-invariant mode: a token's bits do not depend on what else its step computes.

Neither the number of rows, nor the other rows, nor how a prompt is cut into chunks, nor whether a token is part of a
prompt, decoded, or computed again after a preemption changes the order in which anything is added up.  For that,

- a product of more rows than `SMALL_STEP` is `invariant_projection`'s, with the summation order of `projection`'s;
- attention is `invariant_attention`'s, for prompts and decodes;
- LayerNorms are always merged from their tiles' statistics, which travel with the residual stream in every step;
- logits of samples and of prompts are both added up as by the head kernel.

It assumes that the matrix units round alike at every tile width.
"""

from collections.abc import Sequence

import torch

from persimmon.kernels import projection, sampling
from persimmon.kernels.chunk_plan import LastTokens, PrefillConfig
from persimmon.kernels.fused import SMALL_STEP, FusedKernels, FusedPlan, FusedWeight, angles_of
from persimmon.kernels.invariant_attention import chunk_attention, config_of, decode_attention
from persimmon.kernels.invariant_projection import project_rows, project_rows_add_, row_statistics
from persimmon.kernels.layer_norm import layer_norm
from persimmon.kernels.operands import Activation, DrawInputs, LayerCache, Linear, Norm, Residual, Rotary
from persimmon.kernels.prefill_attention import qk_norm_rotary_store


class InvariantKernels(FusedKernels):
    """`FusedKernels` whose results for a token depend only on that token and its sequence."""

    def norm_linear(self, x: Residual, norm: Norm, linear: Linear[FusedWeight], plan: FusedPlan) -> torch.Tensor:
        """As `reference.norm_linear`."""
        if len(x.values) <= SMALL_STEP:
            return super().norm_linear(x, norm, linear, plan)
        return project_rows(
            self._normed(x, norm), linear.weight.matrix, linear.bias, config=projection.WIDE, pdl=self.pdl
        )

    def norm_linear_relu_squared(
        self, x: Residual, norm: Norm, linear: Linear[FusedWeight], plan: FusedPlan
    ) -> Activation:
        """As `reference.norm_linear_relu_squared`."""
        if len(x.values) <= SMALL_STEP:
            return super().norm_linear_relu_squared(x, norm, linear, plan)
        values = project_rows(
            self._normed(x, norm),
            linear.weight.matrix,
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
        ahead: Linear[FusedWeight] | None = None,
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

    def product(self, inputs: Activation, linear: Linear[FusedWeight], plan: FusedPlan) -> torch.Tensor:
        """As `reference.product`."""
        del plan
        weight = linear.weight
        return project_rows(
            inputs.values,
            weight.matrix,
            linear.bias,
            transposed=weight.format == "columns",
            config=_config_of(weight),
            pdl=self.pdl,
        )

    def add_(self, x: Residual, update: torch.Tensor, plan: FusedPlan) -> None:
        """As `reference.add_`."""
        del plan
        x.values += update
        x.statistics = row_statistics(x.values, pdl=self.pdl)

    def add_product_(self, x: Residual, inputs: Activation, linear: Linear[FusedWeight], plan: FusedPlan) -> None:
        """As `reference.add_product_`."""
        if len(x.values) <= SMALL_STEP:
            super().add_product_(x, inputs, linear, plan)
            return
        weight = linear.weight
        x.statistics = project_rows_add_(
            x.values,
            inputs.values,
            weight.matrix,
            linear.bias,
            transposed=weight.format == "columns",
            config=_config_of(weight),
            pdl=self.pdl,
        )

    def norm_rows(self, x: Residual, norm: Norm, rows: torch.Tensor | None) -> torch.Tensor:
        """As `reference.norm_rows`."""
        if rows is None:
            return self._normed(x, norm)
        statistics = self._statistics(x)[:, :, rows]
        return layer_norm(x.values[rows], statistics, norm.weight, norm.bias, norm.eps, pdl=self.pdl)

    def logits(self, hidden: torch.Tensor, head: FusedWeight, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """As `reference.logits`, with the bits that `sample` writes."""
        return project_rows(
            hidden, head.matrix, None, config=projection.WIDE, out=out, dtype=torch.float32, pdl=self.pdl
        )

    def sample(
        self,
        hidden: torch.Tensor,
        head: FusedWeight,
        draw: DrawInputs,
        live: torch.Tensor,
        logits: torch.Tensor | None,
    ) -> torch.Tensor:
        """As `FusedKernels.sample`."""
        tokens, _ = sampling.sample_head(
            hidden, head.matrix, draw, live, self._workspaces.sampling, logits=logits, pdl=self.pdl
        )
        return tokens

    def chunk_configs(self, dtype: torch.dtype) -> Sequence[PrefillConfig]:
        """One shape, whatever a chunk's length."""
        return (config_of(dtype),)

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
