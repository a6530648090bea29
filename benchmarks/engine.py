"""What the engine's own work costs: microseconds a sequence and step, by part, with a model that answers at once.

    python -m benchmarks.engine --running 1 8 64 256 --guesses --out benchmarks/results/NAME.json

The scheduler, the loop, the translation, the messages and the socket (ZeroMQ over a unix socket) are the server's.
Sequences of 128 prompt and 128 output tokens finish and are replaced all the time, as in a server's steady state.  The
worker at the other end of the socket runs between the turns and is not counted; knows no network.
"""

import argparse
import gc
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal, ParamSpec, TypeVar, cast

import msgspec
import torch
import zmq

from benchmarks.machine import write_figures
from persimmon.model.runner import Runner, SequenceInput
from persimmon.model.sampling_params import SamplingParams
from persimmon.model.step_inputs import StepBuffer, write_step
from persimmon.model.step_outcome import StepOutcome
from persimmon.server.engine.blocks import BlockPool
from persimmon.server.engine.core import Engine
from persimmon.server.engine.guesses import Speculation
from persimmon.server.engine.messages import EngineStats, FromEngine, Hello, Ready, StepOutput, Submit
from persimmon.server.engine.plan_runner import PlanRunner
from persimmon.server.engine.process import COLLECTOR_THRESHOLDS
from persimmon.server.engine.scheduler import Scheduler
from persimmon.server.engine.step_cost import GuessCosts, StepCostModel, StepCosts
from persimmon.server.engine.step_plan import Advance, StepPlan
from persimmon.server.engine.step_runner import LaunchedStep
from persimmon.server.settings.speculation import SpeculativeConfig

BLOCK_SIZE = 32
VOCABULARY = 8192
PERIOD = 16
"""Answers that are guessed right repeat themselves after this many tokens."""

GUESSES = SpeculativeConfig(method="auto", num_speculative_tokens=4)

Kind = Literal["none", "wrong", "right"]
"""What becomes of guesses: none are made, answers repeat nothing, or all guesses are right."""


Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Stopwatch:
    """Seconds spent in each of several named parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(
        self, part: str, do: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        """Does something and adds the time it takes to a part."""
        started = time.perf_counter()
        try:
            return do(*args, **kwargs)
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started


class TimedScheduler(Scheduler):
    """The scheduler, timed."""

    stopwatch: Stopwatch

    def plan(self, *args: Any) -> StepPlan:
        """Plans."""
        return self.stopwatch.time("plan", super().plan, *args)

    def plan_ahead(self, *args: Any) -> StepPlan | None:
        """Plans ahead."""
        return self.stopwatch.time("plan", super().plan_ahead, *args)

    def commit(self, plan: StepPlan, drawn: Sequence[list[int]]) -> list[Advance]:
        """Commits."""
        return self.stopwatch.time("commit", super().commit, plan, drawn)


class TimedPlanRunner(PlanRunner):
    """The translation, timed."""

    stopwatch: Stopwatch

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Translates and launches."""
        return self.stopwatch.time("translate", super().launch, plan)


class CheapGuesses(StepCostModel):
    """What steps cost, where a guess costs a tenth of a sequence that decodes: all that are likely to be right pay."""

    @property
    def costs(self) -> StepCosts:
        """With given costs of guesses."""
        return replace(super().costs, guesses=GuessCosts(1.0, 0.01, 0.0, observed=True, token=0.001))


class InstantStep:
    """A step that has been computed."""

    def __init__(self, tokens: list[list[int]]) -> None:
        self._result = StepOutcome(tokens=tokens)

    def wait(self) -> StepOutcome:
        """The tokens."""
        return self._result


class InstantRunner:
    """Has a step's tokens at once.  What it takes to write a step's inputs for a GPU it measures apart from the rest.

    Args:
        stopwatch: gets the time of that, and of making up the tokens.
        load: what runs.
    """

    rope_limit = None

    def __init__(self, stopwatch: Stopwatch, load: "Load") -> None:
        self._stopwatch = stopwatch
        self._load = load
        self._random = Random(1)
        self._buffer = StepBuffer(load.running, -(-load.tokens // BLOCK_SIZE), torch.device("cpu"))

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies nothing."""

    def launch(self, batch: Sequence[SequenceInput]) -> InstantStep:
        """Answers."""
        self._stopwatch.time("GPU inputs", self._write, batch)
        return InstantStep(self._stopwatch.time("answers", self._draw, batch))

    def _write(self, batch: Sequence[SequenceInput]) -> None:
        decodes = [item for item in batch if len(item.token_ids) == 1]
        if decodes:
            write_step(self._buffer, decodes, len(decodes))

    def _draw(self, batch: Sequence[SequenceInput]) -> list[list[int]]:
        drawn = []
        for item in batch:
            end = item.start + len(item.token_ids)
            drawn += [[self._token(end - later) for later in range(draws - 1, -1, -1)] for draws in item.draws]
        return drawn

    def _token(self, position: int) -> int:
        return 1 + (position % PERIOD if self._load.guesses == "right" else self._random.randrange(VOCABULARY - 1))


@dataclass(frozen=True)
class Load:
    """What runs.

    Attributes:
        running: sequences side by side.
        prompt_length: of each.
        output_length: of each.
        overlap: whether a step is planned while another is under way.
        guesses: what becomes of guesses.
    """

    running: int
    prompt_length: int = 128
    output_length: int = 128
    overlap: bool = False
    guesses: Kind = "none"

    @property
    def tokens(self) -> int:
        """Of a sequence."""
        return self.prompt_length + self.output_length


@dataclass(frozen=True)
class Budget:
    """What a step costs.

    Attributes:
        load: what ran.
        steps: measured.
        sequence_steps: how often a sequence got a token, and those that were guessed with it.
        tokens_per_step: tokens that a sequence got in a step.
        plan, translate, commit, messages: microseconds a sequence and step: which tokens run; in the model's words;
            what came of it; outputs, encoding, sending, and reading what arrives.
        gpu_inputs: writing a decode step's inputs for a GPU, which comes on top.
        longest_turn_ms: the longest turn of the loop.
        collections: of the garbage collector's oldest generation meanwhile.
    """

    load: Load
    steps: int
    sequence_steps: int
    tokens_per_step: float
    plan: float
    translate: float
    commit: float
    messages: float
    gpu_inputs: float
    longest_turn_ms: float
    collections: int

    @property
    def total(self) -> float:
        """Microseconds a sequence and step, without what is a GPU's."""
        return self.plan + self.translate + self.commit + self.messages


class Bench:
    """An engine at work on a load, and the worker that it works for."""

    def __init__(self, load: Load, folder: Path) -> None:
        tokens = load.tokens
        self.load = load
        self.stopwatch = Stopwatch()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        router, self._worker = self._context.socket(zmq.ROUTER), self._context.socket(zmq.DEALER)
        for socket in (router, self._worker):
            socket.set_hwm(0)
        router.bind(f"ipc://{folder}/engine")
        self._worker.connect(f"ipc://{folder}/engine")
        pool = BlockPool((load.running + 8) * (-(-tokens // BLOCK_SIZE) + 1), BLOCK_SIZE)
        config = None if load.guesses == "none" else GUESSES
        self._scheduler = TimedScheduler(
            pool,
            max_num_seqs=load.running,
            max_num_batched_tokens=max(2048, 8 * load.running),
            max_model_len=tokens,
            speculation=Speculation.of(config, load.running, tokens),
        )
        self._scheduler.stopwatch = self.stopwatch
        # The loop asks no more of a runner than these two methods.
        instant = cast("Runner", InstantRunner(self.stopwatch, load))
        runner = TimedPlanRunner(instant)
        runner.stopwatch = self.stopwatch
        ready = Ready(
            max_model_len=tokens,
            block_size=BLOCK_SIZE,
            total_blocks=pool.num_blocks,
            device="none",
            dtype="none",
            stats=self._scheduler.stats(),
        )
        self._engine = Engine(
            socket=router,
            scheduler=self._scheduler,
            run=runner,
            limits=ready,
            costs=StepCostModel() if load.guesses == "none" else CheapGuesses(),
            overlap=load.overlap,
        )
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self._ids = itertools.count()
        self._random = Random(0)

    @property
    def stats(self) -> EngineStats:
        """The engine's counts."""
        return self._scheduler.stats()

    def start(self) -> None:
        """Begins with sequences that end at all times, and runs until none of them is left."""
        self._worker.send(msgspec.msgpack.encode(Hello()))
        self._engine.turn()
        self._worker.recv()
        self._worker.recv()
        for number in range(self.load.running):
            self._submit(1 + number * self.load.output_length // self.load.running)
        for _ in range(self.load.output_length + 4):
            self.turn()

    def turn(self) -> float:
        """One turn of the loop, in seconds; then the worker replaces what has ended."""
        started = time.perf_counter()
        self._engine.turn()
        seconds = time.perf_counter() - started
        # Every turn has something to report.
        message = self._decoder.decode(self._worker.recv())
        for output in message.outputs if isinstance(message, StepOutput) else ():
            if output.finish_reason:
                self._submit(self.load.output_length)
        return seconds

    def close(self) -> None:
        """Gives everything back."""
        self._engine.close()
        self._context.destroy(linger=0)

    def _submit(self, max_tokens: int) -> None:
        prompt = [self._random.randrange(VOCABULARY) for _ in range(self.load.prompt_length)]
        submit = Submit(
            sequence_id=next(self._ids),
            token_ids=prompt,
            max_tokens=max_tokens,
            stop_token_ids=[0],
            sampling=SamplingParams(temperature=0.8, top_p=0.9, seed=5),
        )
        self._worker.send(msgspec.msgpack.encode(submit))


@contextmanager
def running(load: Load) -> Iterator[Bench]:
    """An engine in its steady state."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(load, Path(folder))
        try:
            bench.start()
            yield bench
        finally:
            bench.close()


def measure(load: Load, steps: int) -> Budget:
    """Measures the steady state over `steps` turns."""
    with running(load) as bench:
        # As the engine process does.
        gc.collect()
        gc.freeze()
        thresholds = gc.get_threshold()
        gc.set_threshold(*COLLECTOR_THRESHOLDS)
        before, collections = bench.stats, gc.get_stats()[2]["collections"]
        bench.stopwatch.seconds.clear()
        turns = [bench.turn() for _ in range(steps)]
        collections = gc.get_stats()[2]["collections"] - collections
        gc.unfreeze()
        gc.set_threshold(*thresholds)
        tokens = bench.stats.generated_tokens - before.generated_tokens
        sequence_steps = tokens - (bench.stats.accepted_tokens - before.accepted_tokens)
        seconds = bench.stopwatch.seconds
        gpu_inputs = seconds["GPU inputs"]
        parts = {
            "plan": seconds["plan"],
            "translate": seconds["translate"] - gpu_inputs - seconds["answers"],
            "commit": seconds["commit"],
            "messages": sum(turns) - seconds["plan"] - seconds["translate"] - seconds["commit"],
            "gpu_inputs": gpu_inputs,
        }
        return Budget(
            load=load,
            steps=steps,
            sequence_steps=sequence_steps,
            tokens_per_step=round(tokens / sequence_steps, 3),
            **{part: round(own / sequence_steps * 1e6, 3) for part, own in parts.items()},
            longest_turn_ms=round(max(turns) * 1e3, 3),
            collections=collections,
        )


def table(budgets: Sequence[Budget]) -> str:
    """The budgets as Markdown."""
    lines = [
        "| running | plan | translate | commit | plan to commit | messages | in all | GPU inputs | longest turn, ms |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for own in budgets:
        decided = own.plan + own.translate + own.commit
        figures = (own.plan, own.translate, own.commit, decided, own.messages, own.total, own.gpu_inputs)
        shown = " | ".join(f"{figure:.2f}" for figure in figures)
        name = f"{own.load.running}{', overlapped' if own.load.overlap else ''}"
        name += f", {own.load.guesses} guesses" if own.load.guesses != "none" else ""
        lines.append(f"| {name} | {shown} | {own.longest_turn_ms:.2f} |")
    return "\n".join(lines)


def added_by_guesses(budgets: Sequence[Budget]) -> str:
    """What guessing adds to plan, translation and commit, as Markdown."""
    decided = {own.load: own.plan + own.translate + own.commit for own in budgets}
    lines = ["| running | guesses | added | tokens a step |", "| ---: | --- | ---: | ---: |"]
    for own in budgets:
        if own.load.guesses != "none":
            added = decided[own.load] - decided[load_of(own.load.running, "none", overlap=own.load.overlap)]
            lines.append(f"| {own.load.running} | {own.load.guesses} | {added:.2f} | {own.tokens_per_step:.2f} |")
    return "\n".join(lines)


def load_of(running: int, guesses: Kind, *, overlap: bool) -> Load:
    """What main measures: answers as long as others in steps, where all guesses are right."""
    output_length = 128 * (1 + GUESSES.max_guesses) if guesses == "right" else 128
    return Load(running, output_length=output_length, overlap=overlap, guesses=guesses)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine", description="Measure what the engine's own work costs."
    )
    parser.add_argument(
        "--running",
        type=int,
        nargs="+",
        default=[1, 8, 64, 256],
        metavar="N",
        help="sequences side by side, measured one after the other [default: 1 8 64 256]",
    )
    parser.add_argument("--steps", type=int, default=1000, help="turns measured of each [default: %(default)s]")
    parser.add_argument("--overlap", action="store_true", help="plan each step while the one before it is under way")
    parser.add_argument("--guesses", action="store_true", help="measure also with guesses, all wrong and all right")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all results as JSON")
    arguments = parser.parse_args()
    if min(arguments.running) < 1 or arguments.steps < 1:
        parser.error("--running and --steps need at least 1")
    kinds: tuple[Kind, ...] = ("none", "wrong", "right") if arguments.guesses else ("none",)
    loads = [load_of(count, kind, overlap=arguments.overlap) for count in arguments.running for kind in kinds]
    budgets = [measure(load, arguments.steps) for load in loads]
    print("Microseconds a sequence and step:\n")
    print(table(budgets))
    if arguments.guesses:
        print("\nWhat guessing adds to plan, translation and commit, microseconds a sequence and step:\n")
        print(added_by_guesses(budgets))
    figures = [asdict(own) | {"total": round(own.total, 3)} for own in budgets]
    write_figures(arguments.out, {"budgets": figures})


if __name__ == "__main__":
    main()
