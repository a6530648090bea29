"""The part of a machine's cores that each rank of an engine computes on."""

import os
from dataclasses import dataclass

import torch

from persimmon.kernels import KernelsUnavailableError
from persimmon.model.cores import core_shares, usable_cores


@dataclass(frozen=True, slots=True)
class RankCores:
    """What one rank computes with on a CPU.

    Attributes:
        cores: that it runs on; empty for all.
        threads: that compute.
    """

    cores: frozenset[int]
    threads: int

    def take(self) -> None:
        """Keeps the calling thread, and those that it starts from now on, to this; torch has not computed before."""
        if self.cores:
            os.sched_setaffinity(0, self.cores)
        torch.set_num_threads(self.threads)


def cores_of_ranks(ranks: int, device: torch.device) -> list[RankCores]:
    """Divides the cores that this process may use; for a single rank, and next to GPUs, they stay as they are.

    OMP_NUM_THREADS is the number of threads of all ranks together.

    Args:
        ranks: how many there are.
        device: that the first one computes on.

    Raises:
        KernelsUnavailableError: there are too few.
    """
    cores = usable_cores()
    threads = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else cores
    if ranks == 1 or device.type != "cpu":
        return [RankCores(frozenset(), max(1, threads // ranks))] * ranks
    if ranks > cores:
        raise KernelsUnavailableError(
            f"--tensor-parallel-size is {ranks}, but the engine may use {cores} core{'s' if cores > 1 else ''}, and "
            f"each rank needs one: give at most {cores}"
        )
    # A control group limits the time on cores that others use too; then no core is anyone's own.
    own = core_shares(ranks) if cores == len(os.sched_getaffinity(0)) else [frozenset[int]()] * ranks
    return [RankCores(each, max(1, threads // ranks)) for each in own]
