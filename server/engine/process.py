"""The engine process: loads the model, then runs the loop of core.py over it.

Knows what the parts of the engine are, and puts them together.
"""

import gc
import signal
import sys
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import zmq

from persimmon.kernels import KernelsUnavailableError
from persimmon.model.config import PersimmonConfig
from persimmon.model.errors import CheckpointError
from persimmon.model.grammar import GrammarCompiler
from persimmon.model.memory import MemoryPlanError
from persimmon.model.tokenizer import Tokenizer
from persimmon.model.vocabulary import VocabularyMap
from persimmon.server import logs
from persimmon.server.child_process import CannotStart, follow_supervisor, ignore
from persimmon.server.engine.blocks import BlockPool
from persimmon.server.engine.core import Engine
from persimmon.server.engine.guesses import Speculation
from persimmon.server.engine.loading import load_model
from persimmon.server.engine.messages import Ready
from persimmon.server.engine.plan_runner import PlanRunner
from persimmon.server.engine.profiling import ProfiledRunner
from persimmon.server.engine.scheduler import Scheduler
from persimmon.server.engine.step_cost import StepCostModel
from persimmon.server.engine.step_runner import StepRunner
from persimmon.server.engine_places import EnginePlace
from persimmon.server.free_memory import return_free_memory
from persimmon.server.settings.engine import EngineSettings
from persimmon.server.vitals import Vitals

COLLECTOR_THRESHOLDS = (50_000, 20, 100)
"""What a step makes dies by its reference counts.  With Python's own thresholds the collector took a twentieth of the
loop's time, up to a millisecond at once, and found nothing; cycles, which errors may leave, it finds all the same."""


def run_engine(settings: EngineSettings, folder: Path, place: EnginePlace, report: Connection) -> None:
    """Entry point of the process.

    Args:
        settings: of the engine.
        folder: the checkpoint's.
        place: the engine's among those of its server.
        report: gets one `Ready` when the model is loaded and has run, or `CannotStart`.

    Exits with code 2 when the checkpoint, the GPU or the settings do not allow a start, after one line on the console
    unless there are other engines, which say the same: then it is for the supervisor to print.
    """
    several = place.count > 1
    logs.configure(f"engine {place.index}" if several else "engine", settings.log_format, settings.log_level)
    follow_supervisor()
    # Sent to all processes of a service at once; the supervisor ends this one when the open requests have ended.
    ignore({signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2})
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    # Unbounded on purpose: what is in flight is bounded by admission, and a dropped message is a lost answer.
    socket.set_hwm(0)
    # Bound before the model loads, so that a worker's hello waits here and is answered at once.
    socket.bind(place.address)
    if settings.profile_steps is not None:
        try:
            settings.profile_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            _cannot_start(f"--profile-dir {settings.profile_dir} is not a folder: {error.strerror}", place, report)
    try:
        loaded = load_model(settings, folder, partial(_print_progress, place), place.share.memory_bytes)
    except (CheckpointError, KernelsUnavailableError, MemoryPlanError) as error:
        _cannot_start(str(error), place, report)
    plan = loaded.plan
    pool = BlockPool(
        plan.num_blocks, plan.block_size, prefix_caching=settings.enable_prefix_caching, tracks_changes=several
    )
    speculation = Speculation.of(loaded.speculation, settings.max_num_seqs, plan.max_model_len)
    scheduler = Scheduler(
        pool,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
        rope_limit=loaded.runner.rope_limit,
        speculation=speculation,
        max_guess_rows=loaded.runner.max_guess_rows,
    )
    ready = Ready(
        max_model_len=plan.max_model_len,
        block_size=plan.block_size,
        total_blocks=plan.num_blocks,
        device=loaded.device,
        dtype=str(loaded.dtype).removeprefix("torch."),
        stats=scheduler.stats(),
        weights=loaded.weights,
        cache_dtype=settings.kv_cache_dtype,
        rope_limit=loaded.runner.rope_limit,
    )
    # At the start, because with a large vocabulary it takes a second in which no step could run.
    runner: StepRunner = PlanRunner(loaded.runner, _grammar_compiler(folder), guess_forced=speculation is not None)
    if settings.profile_steps is not None:
        runner = ProfiledRunner(
            run=runner, parts=loaded.runner, steps=settings.profile_steps, folder=settings.profile_dir
        )
    report.send(ready)
    # What lives now lives as long as the process: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)
    return_free_memory()  # what the start has borrowed
    # A CPU is the host itself: nothing would run at the same time.
    overlap = {"on": True, "off": False, "auto": loaded.executor.overlaps}[settings.async_scheduling]
    vitals = Vitals.private() if place.vitals is None else Vitals.open(place.vitals)
    costs = StepCostModel(None if settings.max_itl_ms is None else settings.max_itl_ms / 1000)
    Engine(
        socket=socket,
        scheduler=scheduler,
        run=runner,
        limits=ready,
        costs=costs,
        overlap=overlap,
        queue_timeout=settings.queue_timeout,
        graph_replays=lambda: loaded.runner.graph_replays,
        reported_pool=pool if several else None,
        beat=partial(vitals.beat, engine=place.index),
    ).serve_forever()


def _print_progress(place: EnginePlace, line: str) -> None:
    logs.print_line(f"engine {place.index}: {line.strip()}" if place.count > 1 else line)


def _cannot_start(reason: str, place: EnginePlace, report: Connection) -> NoReturn:
    if place.count == 1:
        logs.print_line(f"persimmon: error: {reason}")
    report.send(CannotStart(reason))
    sys.exit(2)


def _grammar_compiler(folder: Path) -> GrammarCompiler:
    """Compiles grammars for a checkpoint, whose tokens are the rows of its embedding."""
    config = PersimmonConfig.from_folder(folder)
    token_bytes = Tokenizer.from_folder(folder).text_bytes()
    vocabulary = VocabularyMap.from_folder(folder, config)
    if vocabulary is not None:
        token_bytes = [token_bytes[token_id] if token_id < len(token_bytes) else b"" for token_id in vocabulary.ids]
    return GrammarCompiler(token_bytes, config.vocab_size, config.eos_token_ids)
