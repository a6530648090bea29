"""The operations the network is made of, behind one interface with one implementation per kind of device.

Imports torch, triton and nothing of ours.  `reference` is plain torch: the CPU path, and what every kernel is tested
against.  `fused` is Triton: the path of a GPU.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch

from persimmon.kernels import reference
from persimmon.kernels.cpu import library
from persimmon.kernels.cpu.native import NativeKernels, QuantizedActivations
from persimmon.kernels.launch import KernelsUnavailableError, check_gpu
from persimmon.kernels.operands import Activation, LayerCache, Linear, Norm, Residual, Rotary, StepLimits, Weight
from persimmon.kernels.quantized import QuantizedFormat, QuantizedMatrix

__all__ = [
    "Activation",
    "Kernels",
    "KernelsUnavailableError",
    "LayerCache",
    "Linear",
    "Norm",
    "QuantizedActivations",
    "QuantizedFormat",
    "QuantizedMatrix",
    "Residual",
    "Rotary",
    "StepLimits",
    "Weight",
    "cpu_multiplies_bfloat16",
    "for_device",
]

Plan = TypeVar("Plan")
W = TypeVar("W", bound=Weight)


class Kernels(Protocol[Plan, W]):
    """What an implementation offers; shapes, dtypes and maths are documented in `persimmon.kernels.reference`.

    `Plan` is what the implementation makes of a step's sequences, once, for all layers; `W` is what it makes of the
    matrix of a product.  Only the implementation reads either.
    """

    def workspace_bytes(self, limits: StepLimits) -> int: ...  # noqa: D102

    def reserve(self, limits: StepLimits) -> None: ...  # noqa: D102

    def stored_dtype(self, stored: torch.dtype, dtype: torch.dtype) -> torch.dtype: ...  # noqa: D102

    def cache_dtypes(self, dtype: torch.dtype) -> Sequence[torch.dtype]: ...  # noqa: D102

    def prepare_bias(self, bias: torch.Tensor) -> torch.Tensor: ...  # noqa: D102

    def prepare_weight(self, weight: torch.Tensor | QuantizedMatrix, *, sparse_input: bool = False) -> W: ...  # noqa: D102

    def tied_weight(self, table: torch.Tensor | QuantizedMatrix) -> W: ...  # noqa: D102

    def tied_bytes(self, shape: tuple[int, int], stored: torch.dtype | QuantizedFormat) -> int: ...  # noqa: D102

    def weight_bytes(self, shape: tuple[int, int], stored: torch.dtype | QuantizedFormat) -> int: ...  # noqa: D102

    def plan_attention(  # noqa: D102
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
    ) -> Plan: ...

    def rotary_at(self, table: Rotary, plan: Plan) -> Rotary: ...  # noqa: D102

    def embed(  # noqa: D102
        self,
        token_ids: torch.Tensor,
        sampled: torch.Tensor | None,
        table: torch.Tensor | QuantizedMatrix,
        plan: Plan,
    ) -> Residual: ...

    def norm_linear(self, x: Residual, norm: Norm, linear: Linear[W], plan: Plan) -> torch.Tensor: ...  # noqa: D102

    def attention(  # noqa: D102
        self,
        qkv: torch.Tensor,
        qk_norm: Norm | None,
        rotary: Rotary,
        cache: LayerCache,
        plan: Plan,
        *,
        ahead: Linear[W] | None = None,
    ) -> torch.Tensor: ...

    def norm_linear_relu_squared(  # noqa: D102
        self, x: Residual, norm: Norm, linear: Linear[W], plan: Plan
    ) -> Activation: ...

    def product(self, inputs: Activation, linear: Linear[W]) -> torch.Tensor: ...  # noqa: D102

    def add_(self, x: Residual, update: torch.Tensor, plan: Plan) -> None: ...  # noqa: D102

    def add_product_(self, x: Residual, inputs: Activation, linear: Linear[W], plan: Plan) -> None: ...  # noqa: D102

    def norm_rows(self, x: Residual, norm: Norm, rows: torch.Tensor | None) -> torch.Tensor: ...  # noqa: D102

    def logits(self, hidden: torch.Tensor, head: W) -> torch.Tensor: ...  # noqa: D102


def cpu_multiplies_bfloat16() -> bool:
    """Whether there are kernels for this machine's CPU that multiply bfloat16 numbers as they are."""
    return "avx512_bf16" in library.builds()


def for_device(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    batch_invariant: bool = False,
    allow_old_triton: bool = False,
    quantized_activations: QuantizedActivations = "auto",
) -> Kernels[Any, Any]:
    """The implementation that runs on this device: fused Triton kernels on a GPU, on a CPU C or else plain torch.

    Args:
        device: where the network runs.
        dtype: that it computes in.
        batch_invariant: whether a token's bits must not depend on what else a step computes.
        allow_old_triton: whether a GPU may be used with a Triton that can make results wrong on it.
        quantized_activations: what the C kernels multiply quantized weights by, see `NativeKernels`; all others
            leave activations as they are.

    Raises:
        KernelsUnavailableError: the GPU, or the software installed for it, is not sufficient; or plain torch is all
            there is, and its products are not batch-invariant.
    """
    if device.type == "cuda":
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        check_gpu(name, capability, allow_old_triton=allow_old_triton)
        # They import Triton, which a CPU does not need.
        from persimmon.kernels.fused import FusedKernels
        from persimmon.kernels.invariant import InvariantKernels

        return InvariantKernels(device) if batch_invariant else FusedKernels(device)
    builds = library.builds()
    if builds:
        return NativeKernels(builds[0], dtype, quantized_activations)
    if batch_invariant:
        raise KernelsUnavailableError(
            "--batch-invariant needs the C kernels on a CPU, and none is built for this processor: torch, "
            "which computes instead, adds up a product in an order that depends on the number of rows. Reinstall the "
            "project with a C compiler on a processor with AVX2, or serve without the flag"
        )
    return reference
