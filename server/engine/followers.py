"""The other ranks of an engine, as the first one has them: processes that do what each step needs of them.

The first rank plans, draws and reports.  It sends each step over a pipe, because a process that waits in a collective
operation of torch.distributed has a time limit, and an engine may be idle for days.
"""

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context, util
from multiprocessing.context import SpawnProcess
from pathlib import Path

import msgspec

from persimmon.model.errors import CheckpointError
from persimmon.model.executor import Executor
from persimmon.model.memory import MemoryPlan
from persimmon.model.runner import PendingStep, Runner, SequenceInput
from persimmon.model.shard import Shard
from persimmon.server import logs
from persimmon.server.child_process import CannotStart
from persimmon.server.children import spawn
from persimmon.server.engine.follower import RankReady, run_follower
from persimmon.server.engine.model_setup import Agreement
from persimmon.server.engine.rank_cores import RankCores
from persimmon.server.engine.rank_messages import RankStep
from persimmon.server.engine.step_runner import EngineBrokenError
from persimmon.server.settings.engine import EngineSettings

logger = logging.getLogger(__name__)


class RankLostError(RuntimeError):
    """Another rank has ended, so the network cannot be computed any more."""


@dataclass(frozen=True, slots=True)
class _Follower:
    """One of the other ranks: its number, its process, and this end of the pipe to it."""

    rank: int
    process: SpawnProcess
    pipe: connection.Connection


class Followers:
    """Starts the other ranks, and ends them.  They also end when this process ends, for whatever reason.

    Args:
        settings: of the engine.
        folder: the checkpoint's.
        cores: of each of them.
        rendezvous: the file over which all ranks find each other.

    Attributes:
        rendezvous: as given.

    Raises:
        OSError: the system allows no more processes.
    """

    def __init__(self, settings: EngineSettings, folder: Path, cores: Sequence[RankCores], rendezvous: Path) -> None:
        self.rendezvous = rendezvous
        self._folder = folder
        self._encoder = msgspec.msgpack.Encoder()
        self._closing = False
        self._ready = False
        self._all: list[_Follower] = []
        # multiprocessing waits for the end of child processes when this one exits, but calls this first.
        util.Finalize(None, self.close, exitpriority=1)
        try:
            for rank, own in enumerate(cores, 1):
                pipe, end = get_context("spawn").Pipe()
                with end:
                    process = spawn(
                        f"persimmon-rank-{rank}",
                        run_follower,
                        settings,
                        folder,
                        Shard(rank, 1 + len(cores)),
                        own,
                        rendezvous,
                        end,
                    )
                self._all.append(_Follower(rank, process, pipe))
        except OSError:
            self.close()
            raise

    def __len__(self) -> int:
        """How many other ranks there are."""
        return len(self._all)

    def agree(self, mine: Agreement) -> int | None:
        """Waits until all have read the headers of the checkpoint, and compares what they have decided.

        From then on this process ends when one of them does.

        Returns:
            The fewest bytes that one of them may use of its GPU; None on a CPU, whose memory they share.

        Raises:
            CheckpointError: one of them cannot start, or has found another checkpoint.
            RankLostError: one of them has ended.
        """
        free: list[int] = []
        for follower in self._all:
            try:
                message = follower.pipe.recv()
            except EOFError:
                follower.process.join()
                raise RankLostError(
                    f"rank {follower.rank} ended with code {follower.process.exitcode} before it was ready"
                ) from None
            if isinstance(message, CannotStart):
                raise CheckpointError(f"rank {follower.rank} cannot start: {message.reason}")
            if not isinstance(message, RankReady):
                raise TypeError(f"rank {follower.rank} sent {type(message).__name__}; expected RankReady")
            if message.gpu_bytes is not None:
                free.append(message.gpu_bytes)
            if (what := mine.difference(message.agreement)) is not None:
                raise CheckpointError(
                    f"rank 0 and rank {follower.rank} of the model in {self._folder} disagree about {what}: start the "
                    f"server again"
                )
        threading.Thread(target=self._watch, name="follow-ranks", daemon=True).start()
        return min(free, default=None)

    def build(self, plan: MemoryPlan) -> None:
        """Lets them read their weights and meet the other ranks."""
        for follower in self._all:
            follower.pipe.send(plan)

    def send(self, step: RankStep) -> None:
        """Lets them do what a step needs of them."""
        self._ready = True
        message = self._encoder.encode(step)
        for follower in self._all:
            follower.pipe.send_bytes(message)

    def close(self) -> None:
        """Ends them at once, and waits for it."""
        self._closing = True
        for follower in self._all:
            follower.process.kill()
        for follower in self._all:
            follower.process.join()
            follower.pipe.close()

    def _watch(self) -> None:
        """Ends this process when one of the others has ended: a step may be waiting for it, and would for long."""
        ended = connection.wait([follower.process.sentinel for follower in self._all])
        if self._closing:
            return
        lost = next(follower for follower in self._all if follower.process.sentinel in ended)
        lost.process.join()
        code = lost.process.exitcode
        if code == 2 and not self._ready:  # it has said why
            logs.flush()
            os._exit(2)
        logger.critical("rank %d ended with code %s; the engine ends with it", lost.rank, code)
        logs.flush()
        os._exit(1)


class LeadingRunner(Runner):
    """Runs steps on all ranks.

    Args:
        executor: runs this rank's part, started.
        followers: the others.
    """

    def __init__(self, executor: Executor, followers: Followers) -> None:
        super().__init__(executor)
        self._followers = followers

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """As `Runner.copy_blocks`, on all ranks."""
        self._followers.send(RankStep(copies=list(pairs)))
        super().copy_blocks(pairs)

    def launch(self, batch: Sequence[SequenceInput]) -> PendingStep:
        """As `Runner.launch`, on all ranks.

        Raises:
            EngineBrokenError: the step failed; the others may wait for what this rank has not sent, or it for them.
        """
        try:
            self._followers.send(RankStep.of(batch))
            return super().launch(batch)
        except Exception as error:
            raise EngineBrokenError("a step failed on the first of several ranks") from error
