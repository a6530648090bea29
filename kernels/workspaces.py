"""The buffers that the launches of all steps share: made once, for the largest step there will be."""

from dataclasses import dataclass

import torch

from persimmon.kernels import packed_projection, projection, sampling
from persimmon.kernels.decode_work import DecodeWorkspace
from persimmon.kernels.fused_weight import DequantizingBuffer, buffer_bytes
from persimmon.kernels.operands import StepLimits
from persimmon.kernels.truncation import TruncationWorkspace


@dataclass(frozen=True, slots=True)
class Workspaces:
    """One of each kind; `dequantized` is None where no matrix of a product is quantized."""

    decode: DecodeWorkspace
    projection: projection.Workspace
    sampling: sampling.Workspace
    truncation: TruncationWorkspace
    dequantized: DequantizingBuffer | None

    @classmethod
    def allocate(cls, limits: StepLimits, small_step: int, device: torch.device) -> "Workspaces":
        """For steps within these limits.

        Args:
            limits: of steps.
            small_step: most rows of a projection that reads a weight as it is stored, where that is not quantized.
            device: that runs the steps.
        """
        partials, counters = _projection_sizes(limits, small_step)
        return cls(
            decode=DecodeWorkspace.allocate(
                limits.max_num_seqs, limits.max_model_len, limits.num_heads, limits.head_dim, device
            ),
            projection=projection.Workspace(
                torch.empty(partials, dtype=torch.float32, device=device),
                torch.zeros(counters, dtype=torch.int32, device=device),
            ),
            sampling=sampling.Workspace.allocate(limits.max_num_seqs, limits.vocab_size, device),
            truncation=TruncationWorkspace.allocate(limits.max_num_seqs, limits.vocab_size, device),
            dequantized=DequantizingBuffer(buffer_bytes(limits.hidden_size, limits.intermediate_size), device)
            if limits.quantized
            else None,
        )

    @staticmethod
    def bytes(limits: StepLimits, small_step: int) -> int:
        """What `allocate` takes."""
        decode = DecodeWorkspace.bytes(limits.max_num_seqs, limits.max_model_len, limits.num_heads, limits.head_dim)
        small = 4 * sum(_projection_sizes(limits, small_step))
        rows, vocab_size = limits.max_num_seqs, limits.vocab_size
        draws = sampling.Workspace.bytes(rows, vocab_size) + TruncationWorkspace.bytes(rows, vocab_size)
        dequantized = buffer_bytes(limits.hidden_size, limits.intermediate_size) if limits.quantized else 0
        return decode + small + draws + dequantized


def _projection_sizes(limits: StepLimits, small_step: int) -> tuple[int, int]:
    """Elements of the partial sums and counters of a layer's projections."""
    hidden = limits.hidden_size
    widths = [
        (3 * hidden, projection.WIDE),
        (limits.intermediate_size, projection.WIDE),
        (hidden, projection.ATTENTION_OUT),
        (hidden, projection.MLP_DOWN),
    ]
    partials, counters = projection.Workspace.sizes(widths, small_step)
    if limits.quantized:
        more = packed_projection.workspace_sizes(hidden)
        partials, counters = max(partials, more[0]), max(counters, more[1])
    return partials, counters
