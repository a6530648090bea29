"""What streams feel while long prompts arrive: inter-token latency without and with them, through the real engine.

    python -m benchmarks.long_prompts --streams 32 --prompt-len 4096 --out benchmarks/results/NAME.json

A random network of 33M parameters on this machine behind the server's own scheduler and loop; tokens are timed where
the engine sends them.  One long prompt follows the other while the streams go on, and short ones come behind them.
Measured with chunks bounded by their time, and by only the token budget.  Knows no HTTP.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from pydantic import ByteSize

from benchmarks.checkpoint import CONFIG, write_checkpoint
from benchmarks.local_engine import LocalEngine, load
from benchmarks.machine import write_figures
from persimmon.model.sampling_params import SamplingParams
from persimmon.server.config import Settings
from persimmon.server.engine.loading import LoadedModel
from persimmon.server.engine.messages import Submit
from persimmon.server.engine.plan_runner import PlanRunner
from persimmon.server.engine.step_cost import StepCostModel

ENDLESS = 100_000
SHORT = 48
"""Tokens of a stream's prompt, and of the short ones that come behind long ones."""


@dataclass(frozen=True)
class Latencies:
    """Milliseconds.

    Attributes:
        bounded: whether chunks were bounded by what they take.
        quiet_median, quiet_p99: between the tokens of a stream while nothing else runs.
        busy_median, busy_p99: the same while long prompts are computed.
        ratio: of the two p99.
        long_ttft: until the first token of each long prompt.
        alone_ttft: the same with nothing else to do.
        short_ttft: until the first token of each short prompt that came behind a long one.
    """

    bounded: bool
    quiet_median: float
    quiet_p99: float
    busy_median: float
    busy_p99: float
    ratio: float
    long_ttft: list[float]
    alone_ttft: float
    short_ttft: list[float]


class Client:
    """An engine and a worker that times its tokens."""

    def __init__(self, loaded: LoadedModel, settings: Settings, *, bounded: bool) -> None:
        costs = StepCostModel() if bounded else None
        self._engine = LocalEngine(loaded, settings, PlanRunner(loaded.runner), costs=costs)
        self._random = Random(0)
        self._submitted: list[float] = []
        self.times: list[list[float]] = []
        """When the tokens of each sequence came, in seconds."""

    def submit(self, prompt_length: int, max_tokens: int) -> int:
        """Sends a prompt; its number."""
        number = len(self.times)
        prompt = [self._random.randrange(300, 4000) for _ in range(prompt_length)]
        submit = Submit(
            sequence_id=number, token_ids=prompt, max_tokens=max_tokens, sampling=SamplingParams(temperature=0.0)
        )
        self._engine.submit(submit)
        self.times.append([])
        self._submitted.append(time.perf_counter())
        return number

    def turn(self) -> None:
        """One turn of the engine."""
        for now, output in self._engine.turn():
            self.times[output.sequence_id] += [now] * len(output.token_ids)

    def until_begun(self, numbers: list[int]) -> None:
        """Turns until these have their first tokens."""
        while not all(self.times[number] for number in numbers):
            self.turn()

    def ttft_ms(self, number: int) -> float:
        """How long a sequence's first token took."""
        return round((self.times[number][0] - self._submitted[number]) * 1e3, 1)

    def gaps_ms(self, numbers: list[int], since: float) -> list[float]:
        """Between the tokens that these got since then."""
        gaps = []
        for number in numbers:
            times = [own for own in self.times[number] if own >= since]
            gaps += [(later - earlier) * 1e3 for earlier, later in itertools.pairwise(times)]
        return sorted(gaps)

    def close(self) -> None:
        """Gives everything back."""
        self._engine.close()


def measure(loaded: LoadedModel, settings: Settings, arguments: argparse.Namespace, *, bounded: bool) -> Latencies:
    """Measures one way of planning."""
    with closing(Client(loaded, settings, bounded=bounded)) as client:
        alone = client.submit(arguments.prompt_len, 1)
        client.until_begun([alone])
        alone_ttft = client.ttft_ms(alone)
    with closing(Client(loaded, settings, bounded=bounded)) as client:
        room = settings.max_model_len or ENDLESS
        streams = [client.submit(SHORT, room - SHORT) for _ in range(arguments.streams)]
        client.until_begun(streams)
        for _ in range(8):
            client.turn()
        # What chunks take has to be seen before it can be heeded.
        client.until_begun([client.submit(8 * SHORT, 1)])
        quiet = quiet_gaps(client, streams, arguments.quiet_steps)
        started = time.perf_counter()
        long, short = [], []
        for _ in range(arguments.prompts):
            long.append(client.submit(arguments.prompt_len, 1))
            client.turn()
            short.append(client.submit(SHORT, 1))
            client.until_begun([long[-1], short[-1]])
        busy = client.gaps_ms(streams, started)
        # As many before as after: steps take longer as the streams grow.
        quiet = sorted(quiet + quiet_gaps(client, streams, arguments.quiet_steps))
        quiet_p99, busy_p99 = _p99(quiet), _p99(busy)
        return Latencies(
            bounded=bounded,
            quiet_median=round(statistics.median(quiet), 2),
            quiet_p99=round(quiet_p99, 2),
            busy_median=round(statistics.median(busy), 2),
            busy_p99=round(busy_p99, 2),
            ratio=round(busy_p99 / quiet_p99, 2),
            long_ttft=[client.ttft_ms(number) for number in long],
            alone_ttft=alone_ttft,
            short_ttft=[client.ttft_ms(number) for number in short],
        )


def quiet_gaps(client: Client, streams: list[int], steps: int) -> list[float]:
    """Milliseconds between the streams' tokens while nothing else runs, for `steps` steps."""
    started = time.perf_counter()
    for _ in range(steps):
        client.turn()
    return client.gaps_ms(streams, started)


def _p99(ordered: list[float]) -> float:
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def table(measured: list[Latencies]) -> str:
    """The latencies as Markdown."""
    lines = [
        "| chunks bounded by | quiet ITL median, p99 | with long prompts | p99 ratio | TTFT of long prompts, alone "
        "| of short ones behind them |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {'time' if own.bounded else 'tokens only'} | {own.quiet_median:.1f}, {own.quiet_p99:.1f} ms "
        f"| {own.busy_median:.1f}, {own.busy_p99:.1f} ms | {own.ratio:.2f} "
        f"| {statistics.median(own.long_ttft):,.0f}, {own.alone_ttft:,.0f} ms "
        f"| {statistics.median(own.short_ttft):,.0f} ms |"
        for own in measured
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_prompts", description="Measure what streams feel while long prompts arrive."
    )
    parser.add_argument("--streams", type=int, default=32, help="that go on all the time [default: %(default)s]")
    parser.add_argument("--prompt-len", type=int, default=4096, help="tokens of a long prompt [default: %(default)s]")
    parser.add_argument("--prompts", type=int, default=3, help="long prompts, one after another [default: %(default)s]")
    parser.add_argument(
        "--quiet-steps", type=int, default=200, help="before they arrive, and after [default: %(default)s]"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all results as JSON")
    arguments = parser.parse_args()
    if 2 * arguments.prompt_len <= 8 * SHORT:
        parser.error(f"--prompt-len is {arguments.prompt_len}; expected more than {4 * SHORT}")
    with tempfile.TemporaryDirectory(prefix="persimmon-long-prompts-") as scratch:
        folder = Path(scratch)
        write_checkpoint(folder)
        longest = 2 * arguments.prompt_len
        config: dict[str, Any] = CONFIG | {"max_position_embeddings": longest}
        (folder / "config.json").write_text(json.dumps(config))
        tokens = arguments.streams * 1024 + 4 * arguments.prompt_len
        settings = Settings(
            model=str(folder),
            max_model_len=longest,
            max_num_seqs=arguments.streams + 8,
            kv_cache_memory=ByteSize(tokens * 8 * 2 * 512 * 4),
        )
        loaded = load(settings, folder)
        measured = [measure(loaded, settings, arguments, bounded=bounded) for bounded in (True, False)]
    print(table(measured))
    figures = {
        "streams": arguments.streams,
        "prompt_len": arguments.prompt_len,
        "measured": [asdict(own) for own in measured],
    }
    write_figures(arguments.out, figures)


if __name__ == "__main__":
    main()
