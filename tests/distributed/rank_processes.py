"""Calls a function on every rank of a group, each in a process of its own."""

import pickle
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from persimmon.model.ranks import DistributedRanks
from persimmon.model.shard import Shard
from persimmon.server.children import spawn


def call_on_ranks(size: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What function(ranks, *arguments) returns on each of `size` ranks, which meet in a folder.

    Args:
        size: the number of ranks.
        folder: where they meet; empty.
        function: of a module, which other processes import.
        arguments: after the ranks.
    """
    processes, pipes = [], []
    try:
        for rank in range(size):
            pipe, end = get_context("spawn").Pipe(duplex=False)
            with end:
                shard = Shard(rank, size)
                processes.append(spawn(f"rank-{rank}", _run, shard, folder / "ranks", end, function, arguments))
            pipes.append(pipe)
        answers = [pickle.loads(pipe.recv_bytes()) for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    for rank, (error, _) in enumerate(answers):
        assert error is None, f"rank {rank}:\n{error}"
    return [result for _, result in answers]


def _run(shard: Shard, rendezvous: Path, to: Connection, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    answer: tuple[str | None, Any]
    try:
        ranks = DistributedRanks.join(shard, rendezvous, torch.device("cpu"))
        answer = None, function(ranks, *arguments)
    except Exception:  # noqa: BLE001, it is reported where the test is
        answer = traceback.format_exc(), None
    # A pipe would send tensors as descriptors of memory that ends with this process.
    to.send_bytes(pickle.dumps(answer))
