"""The engine process: loads the model, then runs the loop of core.py over it.

Knows both the scheduler's plans and the model's inputs, and translates.
"""

import gc
import logging
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import zmq

from kernels import KernelsUnavailableError
from model.errors import CheckpointError
from model.memory import MemoryPlanError
from model.runner import Runner, SequenceInput
from model.sampler import SamplingParams
from server.child_process import follow_supervisor
from server.config import Settings
from server.engine.blocks import BlockPool
from server.engine.core import Engine
from server.engine.loading import load_model
from server.engine.messages import Ready
from server.engine.scheduler import ScheduledSequence, Scheduler, StepPlan


def run_engine(settings: Settings, folder: Path, address: str, report: Connection) -> None:
    """Entry point of the process.

    Args:
        settings: of the server.
        folder: the checkpoint's.
        address: the ZeroMQ endpoint to bind, like "ipc:///run/persimmon/engine".
        report: gets one `Ready` when the model is loaded and has run.

    Exits with code 2, after one line on the console, when the checkpoint, the GPU or the settings do not allow a start.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    follow_supervisor()
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    # Unbounded on purpose: what is in flight is bounded by admission, and a dropped message is a lost answer.
    socket.set_hwm(0)
    # Bound before the model loads, so that a worker's hello waits here and is answered at once.
    socket.bind(address)
    try:
        loaded = load_model(settings, folder, print_line)
    except (CheckpointError, KernelsUnavailableError, MemoryPlanError) as error:
        print_line(f"persimmon: error: {error}")
        sys.exit(2)
    plan = loaded.plan
    pool = BlockPool(plan.num_blocks, plan.block_size, prefix_caching=settings.enable_prefix_caching)
    scheduler = Scheduler(
        pool,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
    )
    ready = Ready(
        max_model_len=plan.max_model_len,
        block_size=plan.block_size,
        total_blocks=plan.num_blocks,
        device=loaded.device_name,
        dtype=str(loaded.dtype).removeprefix("torch."),
        stats=scheduler.stats(),
    )
    report.send(ready)
    # What lives now lives as long as the process: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    Engine(socket, scheduler, PlanRunner(loaded.runner), ready).serve_forever()


class PlanRunner:
    """Runs the scheduler's plans on the model.

    Args:
        runner: the model's.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def __call__(self, plan: StepPlan) -> list[int]:
        """One token for each scheduled sequence that samples, in the plan's order."""
        return self._runner.run([_sequence_input(item) for item in plan.scheduled])


def _sequence_input(item: ScheduledSequence) -> SequenceInput:
    sequence = item.sequence
    return SequenceInput(
        token_ids=sequence.token_ids[item.start : item.start + item.count],
        start=item.start,
        block_table=sequence.block_table,
        sampling=_sampling_params(item) if item.samples else None,
    )


def _sampling_params(item: ScheduledSequence) -> SamplingParams:
    asked = item.sequence.sampling
    return SamplingParams(
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        seed=asked.seed,
        sample_index=asked.sample_index,
        position=item.sequence.num_output_tokens,
    )


def print_line(line: str) -> None:
    """One line for the person at the console."""
    print(line, file=sys.stderr, flush=True)
