"""The time of the sums over ranks alone: ranks on this CPU that do nothing else.

A module of its own, because the processes of the ranks import it.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from persimmon.model.config import PersimmonConfig
from persimmon.model.ranks import DistributedRanks, bytes_of_step
from persimmon.model.shard import Shard
from persimmon.server.children import spawn


@dataclass(frozen=True)
class SumFigures:
    """The sums of one step; the median of the repetitions.

    Attributes:
        rows: tokens of the step.
        us: microseconds of all its sums.
        sent_bytes: that a rank sends for them.
    """

    rows: int
    us: float
    sent_bytes: int


def measure_sums(config: PersimmonConfig, rows: Sequence[int], seconds: float, size: int = 2) -> list[SumFigures]:
    """The sums of steps with this many tokens.

    Args:
        config: the network.
        rows: tokens of each step.
        seconds: to repeat each.
        size: the number of ranks.
    """
    with tempfile.TemporaryDirectory(prefix="persimmon-ranks-") as scratch:
        pipes, processes = [], []
        try:
            for rank in range(size):
                pipe, end = get_context("spawn").Pipe(duplex=False)
                with end:
                    meeting = Path(scratch) / "ranks"
                    arguments = Shard(rank, size), meeting, config, list(rows), seconds, end
                    processes.append(spawn(f"rank-{rank}", _sum_on_rank, *arguments))
                pipes.append(pipe)
            times, *_ = [pipe.recv() for pipe in pipes]
        finally:
            for process in processes:
                process.kill()
                process.join()
    sent = [bytes_of_step(config, Shard(0, size), tokens=own, logits_rows=0, itemsize=4) for own in rows]
    return [SumFigures(own, 1e6 * took, count) for own, took, count in zip(rows, times, sent, strict=True)]


def _sum_on_rank(
    shard: Shard, meeting: Path, config: PersimmonConfig, rows: Sequence[int], seconds: float, to: Connection
) -> None:
    torch.set_num_threads(1)
    ranks = DistributedRanks.join(shard, meeting, torch.device("cpu"))
    times = []
    for tokens in rows:
        part = torch.ones(tokens, config.hidden_size)
        end, own = torch.zeros(1), []
        # All ranks stop after the same repetition, which the first decides.
        while not end:
            begin = time.perf_counter()
            for _ in range(1 + 2 * config.num_hidden_layers):
                ranks.sum(part)
            own.append(time.perf_counter() - begin)
            end = ranks.broadcast(torch.tensor([float(len(own) >= 3 and sum(own) > seconds)]))
        times.append(statistics.median(own))
    to.send(times)
