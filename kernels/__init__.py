"""The operations the network is made of, behind one interface with one implementation per kind of device.

Imports torch and nothing of ours.  `reference` is plain torch: the CPU path, and what every other implementation is
tested against.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from kernels import reference
from kernels.reference import AttentionPlan

__all__ = ["AttentionPlan", "Kernels", "for_device"]


class Kernels(Protocol):
    """What an implementation offers; shapes, dtypes and maths are documented in `kernels.reference`."""

    def prepare_weight(self, weight: torch.Tensor) -> torch.Tensor: ...  # noqa: D102

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor: ...  # noqa: D102

    def layer_norm(  # noqa: D102
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor: ...

    def relu_squared(self, x: torch.Tensor) -> torch.Tensor: ...  # noqa: D102

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
    ) -> AttentionPlan: ...

    def qk_norm_rotary_store(  # noqa: D102
        self,
        qkv: torch.Tensor,
        norm_weight: torch.Tensor | None,
        norm_bias: torch.Tensor | None,
        eps: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        plan: AttentionPlan,
    ) -> torch.Tensor: ...

    def paged_attention(  # noqa: D102
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan
    ) -> torch.Tensor: ...


def for_device(device: torch.device) -> Kernels:
    """The implementation that runs on this device.

    The reference runs everywhere torch does, CUDA included, until a faster implementation takes that device over.
    """
    del device
    return reference
