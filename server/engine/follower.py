"""The process of a rank other than the first: reads its part of the weights, then does what each step needs of it."""

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from persimmon.kernels import KernelsUnavailableError
from persimmon.model.errors import CheckpointError
from persimmon.model.following_runner import FollowingRunner
from persimmon.model.memory import MemoryPlan, available_memory
from persimmon.model.ranks import DistributedRanks
from persimmon.model.shard import Shard
from persimmon.server import logs
from persimmon.server.child_process import CannotStart, ignore
from persimmon.server.engine.model_build import build
from persimmon.server.engine.model_setup import Agreement, set_up
from persimmon.server.engine.rank_cores import RankCores
from persimmon.server.engine.rank_messages import RankStep
from persimmon.server.free_memory import return_free_memory
from persimmon.server.settings.engine import EngineSettings


@dataclass(frozen=True, slots=True)
class RankReady:
    """What a rank sends the first one when it has read the headers of the checkpoint.

    Attributes:
        agreement: what it has decided.
        gpu_bytes: that it may use of its GPU; None on a CPU.
    """

    agreement: Agreement
    gpu_bytes: int | None


def run_follower(
    settings: EngineSettings, folder: Path, shard: Shard, cores: RankCores, rendezvous: Path, first: Connection
) -> None:
    """Entry point of the process.

    Args:
        settings: of the engine.
        folder: the checkpoint's.
        shard: the part of this rank.
        cores: that it computes on.
        rendezvous: the file over which all ranks find each other.
        first: the pipe to the first rank.  It gets `RankReady`, or `CannotStart`; then a `MemoryPlan` comes, and a
            `RankStep` for each step.

    Exits with code 2 when the checkpoint does not allow a start, after one line on the console or to the first rank.
    """
    logs.configure(f"rank-{shard.rank}", settings.log_format, settings.log_level)
    # Sent to all processes of a service at once; this one ends with the first rank.
    ignore({signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2})
    cores.take()
    try:
        setup = set_up(settings, folder, shard)
    except (CheckpointError, KernelsUnavailableError) as error:
        first.send(CannotStart(str(error)))
        sys.exit(2)
    on_gpu = setup.device.type != "cpu"
    free = available_memory(setup.device, settings.gpu_memory_utilization).bytes if on_gpu else None
    first.send(RankReady(setup.agreement, free))
    plan = first.recv()
    if not isinstance(plan, MemoryPlan):
        raise TypeError(f"the first rank sent {type(plan).__name__}; expected MemoryPlan")
    try:
        executor = build(settings, setup, plan, DistributedRanks.join(shard, rendezvous, setup.device))
    except CheckpointError as error:  # a file has changed since
        logs.print_line(f"persimmon: error: rank {shard.rank}: {error}")
        sys.exit(2)
    return_free_memory()
    follow(FollowingRunner(executor), first.recv_bytes)


def follow(runner: FollowingRunner, next_message: Callable[[], bytes]) -> None:
    """Runs the steps that come, until nothing comes any more.

    Args:
        runner: of this rank.
        next_message: gives an encoded `RankStep`; raises EOFError where the first rank has ended.
    """
    decoder = msgspec.msgpack.Decoder(RankStep)
    while True:
        try:
            step = decoder.decode(next_message())
        except EOFError:
            return
        if step.copies:
            runner.copy_blocks(step.copies)
        if step.sequences:
            runner.launch([sequence.input for sequence in step.sequences])
