"""The ranks that share a network: sums over all of them, and what each sends to the first or gets from it.

torch.distributed moves the numbers.  The order of a sum is that of the ranks for every number, so a sum has the same
bits whatever else is in it, however it is sent, and whichever rank is late.  Knows no layers.
"""

import os
from datetime import timedelta
from pathlib import Path
from typing import Protocol, Self

import torch
import torch.distributed as dist

from persimmon.model.config import PersimmonConfig
from persimmon.model.shard import Shard

ONE_SHOT_BYTES = 64 << 10
"""Numbers of a rank that take no more than this are sent whole to every other rank: one exchange instead of two."""

PATIENCE = timedelta(hours=1)
"""How long a rank waits for another.  Long, because what watches steps and processes ends ranks that do not come."""


class Ranks(Protocol):
    """What a network needs of the other ranks; each of these calls is made by all of them, in the same order."""

    @property
    def shard(self) -> Shard:
        """The part of this rank."""

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' parts [T, width], on every rank."""

    def gather(self, part: torch.Tensor, config: PersimmonConfig) -> torch.Tensor:
        """What all ranks have of [R, vocab_size] float32 logits, on the first rank; others get back their own part."""

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first rank's tensor, on every rank; of others it has the shape and dtype, and is overwritten."""


class DistributedRanks:
    """Ranks that are processes of their own, each with its device: gloo between CPUs, nccl between GPUs.

    Args:
        shard: the part of this process.
        group: of all ranks; None for all processes that have met.

    Attributes:
        shard: the part of this process.
        bytes_sent: to other ranks so far.
    """

    def __init__(self, shard: Shard, group: dist.ProcessGroup | None = None) -> None:
        self.shard = shard
        self._group = group
        self.bytes_sent = 0

    @classmethod
    def join(cls, shard: Shard, rendezvous: Path, device: torch.device) -> Self:
        """Meets the other ranks, all of which are on this machine, and returns when all have come.

        Args:
            shard: the part of this process, whose only group this is.
            rendezvous: a file that does not exist yet, in a folder that only this user can read; the same for all.
            device: of this rank.

        Raises:
            RuntimeError: they did not come, or the system does not allow the connections.
        """
        # Connections have no password, so they stay on this machine.
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
        backend, own = ("gloo", None) if device.type == "cpu" else ("nccl", device)
        dist.init_process_group(
            backend,
            init_method=f"file://{rendezvous}",
            rank=shard.rank,
            world_size=shard.size,
            timeout=PATIENCE,
            device_id=own,
        )
        return cls(shard)

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """As `Ranks.sum`; in float32, and rounded once at the end where the parts have 16 bits.

        Args:
            part: [T, width], contiguous; the number of ranks divides width.
        """
        size = self.shard.size
        self.bytes_sent += bytes_of_sum(part.nbytes, size)
        if _in_one_shot(part.nbytes, size):
            return sum_in_order(self._all_gather(part))
        # Each rank sums a slice of the numbers, and sends the result to all others.
        slices = part.view(size, -1)
        received = torch.empty_like(slices)
        dist.all_to_all_single(received, slices, group=self._group)
        return self._all_gather(sum_in_order(received)).view(part.shape)

    def gather(self, part: torch.Tensor, config: PersimmonConfig) -> torch.Tensor:
        """As `Ranks.gather`: parts of unequal width are sent in the width of the first rank's, which is the largest."""
        size, rows, first = self.shard.size, len(part), self.shard.rank == 0
        widths = [len(self.shard.vocabulary(config, rank)) for rank in range(size)]
        sent = part.contiguous()
        if part.shape[1] < widths[0]:
            sent = part.new_zeros(rows, widths[0])
            sent[:, : part.shape[1]] = part
        received = part.new_empty(size, rows, widths[0]) if first else None
        dist.gather(sent, None if received is None else list(received), dst=0, group=self._group)
        if received is None:
            self.bytes_sent += bytes_of_gather(rows, config, size)
            return part
        return torch.cat([own[:, :width] for own, width in zip(received, widths, strict=True)], dim=1)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """As `Ranks.broadcast`."""
        dist.broadcast(tensor, src=0, group=self._group)
        if self.shard.rank == 0:
            self.bytes_sent += (self.shard.size - 1) * tensor.nbytes
        return tensor

    def _all_gather(self, own: torch.Tensor) -> torch.Tensor:
        """All ranks' tensors of one shape, in order: [size, ...]."""
        everything = own.new_empty(self.shard.size, *own.shape)
        dist.all_gather(list(everything), own, group=self._group)
        return everything


def sum_in_order(parts: torch.Tensor) -> torch.Tensor:
    """((parts[0] + parts[1]) + parts[2]) + ..., in float32, then in the dtype of the parts; they may be overwritten."""
    total = parts[0].float()
    for part in parts[1:]:
        total += part
    return total.to(parts.dtype)


def bytes_of_sum(nbytes: int, size: int) -> int:
    """Bytes that a rank sends for one sum over `size` ranks, each of which has `nbytes` bytes of numbers."""
    if _in_one_shot(nbytes, size):
        return (size - 1) * nbytes
    # A slice to each other rank, twice: first its own numbers, then the sum of its slice.
    return 2 * (size - 1) * (nbytes // size)


def bytes_of_gather(rows: int, config: PersimmonConfig, size: int) -> int:
    """Bytes of logits that each rank but the first sends for `rows` rows."""
    return rows * len(Shard(0, size).vocabulary(config)) * torch.float32.itemsize


def bytes_of_step(config: PersimmonConfig, shard: Shard, *, tokens: int, logits_rows: int, itemsize: int) -> int:
    """Bytes that a rank sends to others in a step that begins with tokens which the host knows.

    That is one sum of `tokens` rows for the embedding and two for each layer, and the rank's part of the logits.

    Args:
        config: the network.
        shard: the rank's part.
        tokens: of the step.
        logits_rows: rows that logits are made for, draws and reports together.
        itemsize: bytes of an activation.
    """
    sums = 1 + 2 * config.num_hidden_layers
    total = sums * bytes_of_sum(tokens * config.hidden_size * itemsize, shard.size)
    return total if shard.rank == 0 else total + bytes_of_gather(logits_rows, config, shard.size)


def _in_one_shot(nbytes: int, size: int) -> bool:
    # Between two ranks, both ways send the same bytes.
    return size == 2 or nbytes <= ONE_SHOT_BYTES
