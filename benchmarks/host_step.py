"""What a GPU's step costs the host: from sequences to launches, and from host memory to results.

    TRITON_INTERPRET=0 python -m benchmarks.host_step --out benchmarks/results/NAME.json

The 8B network on tensors without memory, with every launch bound to its kernel as for an H100 and then left out, and
graphs that repeat nothing.  So no GPU is needed, and what the driver takes is not in the figures: some 3 us a launch,
and some 10 us a graph, predicted.  Launches are therefore counted, too.  Torch's own operations take longer here than
on a GPU's tensors where it works out shapes in Python: in products above 64 tokens, and for log-probabilities.
Exits with 1 where a step of 32 decodes and a chunk that graphs hold takes longer than `BOUND_MS`.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.machine import write_figures
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import Runner, SequenceInput
from persimmon.model.sampling_params import SamplingParams
from persimmon.server.config import Settings
from persimmon.server.engine.process import COLLECTOR_THRESHOLDS

BOUND_MS = 2.0
"""Most milliseconds of a step of 32 decodes and a chunk."""

LAYERS, CONTEXT, BLOCK_SIZE = 36, 500, 32


@dataclass(frozen=True)
class HostTime:
    """What a kind of step takes.

    Attributes:
        step: its name.
        bound_ms: maximum time; None if it has no bound.
        launches: kernels launched one by one, torch's own not counted.
        replays: CUDA graphs.
        milliseconds: the median step's.
        slowest_tenth_ms: the 90th percentile.
    """

    step: str
    bound_ms: float | None
    launches: int
    replays: int
    milliseconds: float
    slowest_tenth_ms: float

    @property
    def holds(self) -> bool:
        """Whether it stays within its bound."""
        return self.bound_ms is None or self.milliseconds <= self.bound_ms


def sampling(**asked: float) -> RowSampling:
    """The sampling settings of a request."""
    return RowSampling(asked=SamplingParams(temperature=0.8, seed=5, **asked))  # type: ignore[arg-type]


def sequence(count: int, start: int, own: RowSampling) -> SequenceInput:
    """One of `count` new tokens behind `start` others."""
    return SequenceInput(
        token_ids=[7] * count, start=start, block_table=range(-(-(start + count) // BLOCK_SIZE)), samplings=(own,)
    )


def steps() -> Mapping[str, list[SequenceInput]]:
    """By name; those with a bound have 32 decodes and a chunk."""
    drawn, top_p, logprobs = sampling(), sampling(top_p=0.9), sampling(logprobs=5)
    decodes = [sequence(1, CONTEXT, drawn)] * 32
    found = {
        "1 decode": decodes[:1],
        "32 decodes": decodes,
        "32 decodes, top-p": [sequence(1, CONTEXT, top_p)] * 32,
        "32 decodes, log-probabilities": [sequence(1, CONTEXT, logprobs)] * 32,
        "a prompt of 20": [sequence(20, 0, drawn)],
    }
    for count in (16, 64, 256, 480, 1024):
        found[f"32 decodes, a chunk of {count}"] = [*decodes, sequence(count, 0, drawn)]
    found["32 decodes, a chunk of 64, top-p"] = [*found["32 decodes, top-p"], sequence(64, 0, top_p)]
    return found


def measure(runner: Runner, name: str, batch: Sequence[SequenceInput], repeats: int, launched: list[int]) -> HostTime:
    """Measures one kind of step; `launched` counts launches."""
    seconds = []
    for repeat in range(repeats + 3):
        before, replays = launched[0], runner.graph_replays
        started = time.perf_counter()
        runner.launch(batch).wait()
        if repeat >= 3:  # the first ones fill caches
            seconds.append(time.perf_counter() - started)
    replayed = runner.graph_replays - replays
    return HostTime(
        step=name,
        bound_ms=BOUND_MS if "a chunk" in name and replayed else None,
        launches=launched[0] - before,
        replays=replayed,
        milliseconds=round(statistics.median(seconds) * 1e3, 3),
        slowest_tenth_ms=round(sorted(seconds)[int(0.9 * len(seconds))] * 1e3, 3),
    )


def measure_all(settings: Settings, layers: int, repeats: int, kinds: Sequence[str] | None = None) -> list[HostTime]:
    """Every kind of step, or some of them, on a server of these settings."""
    # They bring Triton, which reads its environment.
    from triton.runtime.jit import JITFunction

    from tests.kernels.ahead_of_time import launches_compile
    from tests.model.serving_compilations import GENERATOR, make_runner

    launched = [0]
    with launches_compile(90):
        compile_only = JITFunction.run

        def counted(self: JITFunction, *args: object, **options: object) -> object:
            launched[0] += 1
            return compile_only(self, *args, **options)

        JITFunction.run = counted
        runner = make_runner(settings, replace(GENERATOR, num_hidden_layers=layers))
        # As the engine process does.
        gc.collect()
        gc.freeze()
        thresholds = gc.get_threshold()
        gc.set_threshold(*COLLECTOR_THRESHOLDS)
        found = [
            measure(runner, name, batch, repeats, launched)
            for name, batch in steps().items()
            if kinds is None or name in kinds
        ]
        gc.unfreeze()
        gc.set_threshold(*thresholds)
    return found


def table(found: Sequence[HostTime]) -> str:
    """The figures as Markdown."""
    lines = ["| step | launches | graphs | ms | slowest tenth, ms | bound, ms |", "| --- " + "| ---: " * 5 + "|"]
    for own in found:
        figures = f"{own.launches} | {own.replays} | {own.milliseconds:.2f} | {own.slowest_tenth_ms:.2f}"
        lines.append(f"| {own.step} | {figures} | {'' if own.bound_ms is None else f'{own.bound_ms:.1f}'} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host_step", description="Measure what a GPU's step costs the host, without a GPU."
    )
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the network [default: %(default)s]")
    parser.add_argument("--repeats", type=int, default=100, help="steps measured of each kind [default: %(default)s]")
    parser.add_argument("--eager", action="store_true", help="without graphs, as with --enforce-eager")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all results as JSON")
    arguments = parser.parse_args()
    found = measure_all(Settings(enforce_eager=arguments.eager), arguments.layers, arguments.repeats)
    print(table(found))
    write_figures(arguments.out, {"layers": arguments.layers, "steps": [asdict(own) for own in found]})
    late = [own for own in found if not own.holds]
    for own in late:
        print(f"{own.step}: {own.milliseconds} ms, but at most {own.bound_ms} ms are allowed", file=sys.stderr)
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
