"""What guessing next tokens brings: output tokens a second with and without it, through the real engine.

    python -m benchmarks.speculation --checkpoint demo --streams 1 8 64 --out benchmarks/results/NAME.json

Answers are given: what the network draws is computed and then replaced, so that a random network, or the demo, which
copies nothing, answers as a model does that quotes its prompt, edits it, writes JSON or code, or repeats nothing.  Ways
of guessing run one after the other, several rounds of all; medians of the rounds.  Knows no HTTP.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ByteSize

from benchmarks.checkpoint import DEMO, RANDOM, checkpoint_named
from benchmarks.local_engine import LocalEngine, load
from benchmarks.machine import write_figures
from persimmon.model.grammar import GrammarCompiler, GrammarSpec
from persimmon.model.sampling_params import SamplingParams
from persimmon.model.step_outcome import StepOutcome
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.config import Settings
from persimmon.server.engine.guesses import Speculation
from persimmon.server.engine.loading import LoadedModel
from persimmon.server.engine.messages import Submit
from persimmon.server.engine.plan_runner import PlanRunner
from persimmon.server.engine.step_cost import StepCostModel
from persimmon.server.engine.step_plan import StepPlan
from persimmon.server.engine.step_runner import LaunchedStep
from persimmon.server.settings.speculation import SpeculativeConfig

ANSWER = 192
"""Tokens of an answer."""

METHODS = {
    "none": '{"method": "off"}',
    "ngram": '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}',
    "suffix": '{"method": "suffix", "num_speculative_tokens": 8}',
    "auto": '{"method": "auto"}',
}

SCHEMA = GrammarSpec(
    "json_schema",
    json.dumps(
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "count": {"type": "integer"},
                    "in_stock": {"type": "boolean"},
                },
                "required": ["name", "count", "in_stock"],
            },
        }
    ),
    leading_space=True,
)
"""What answers of the workload "schema" must follow, of which the names of properties are forced."""

MIN_CODE = 2000
"""Characters of code that have as many tokens as an answer."""

CODE = sorted((Path(__file__).parents[1] / "server").rglob("*.py"))
"""What answers of code go on with: each with another file, as far as there are some."""


@dataclass(frozen=True)
class Figures:
    """What one way of guessing brings for one workload; medians of the rounds.

    Attributes:
        workload: what answers are.
        streams: sequences at once.
        method: how tokens are guessed.
        tokens_per_s: output tokens a second of all streams, from the first token to the last.
        itl_p99_ms: 99th percentile, over tokens, of the time since the stream's last output, shared by the tokens that
            came with it.
        gap_p99_ms: 99th percentile, over outputs, of the time since the stream's last output.
        tokens_per_step: output tokens of a stream in a step.
        acceptance: share of the computed guesses that were right.
    """

    workload: str
    streams: int
    method: str
    tokens_per_s: float
    itl_p99_ms: float
    gap_p99_ms: float
    tokens_per_step: float
    acceptance: float


class GivenAnswers:
    """Runs plans, and replaces what is drawn by given answers.

    Args:
        runner: runs the plans.
    """

    def __init__(self, runner: PlanRunner) -> None:
        self._runner = runner
        self.prepare = runner.prepare
        self.answers: dict[int, list[int]] = {}
        """By the number of a sequence."""

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Starts a step."""
        given = [
            self.answers[sample.key[1]][sample.num_output_tokens :][: item.draws]  # type: ignore[index]
            for item in plan.scheduled
            for sample in item.samples
        ]
        return _Given(self._runner.launch(plan), given)


@dataclass(frozen=True)
class _Given:
    launched: LaunchedStep
    tokens: list[list[int]]

    def wait(self) -> StepOutcome:
        outcome = self.launched.wait()
        outcome.tokens = self.tokens
        return outcome


def workload(name: str, tokenizer: Tokenizer, seed: int) -> tuple[list[int], list[int]]:
    """A prompt and its answer, as token ids."""
    # A text of another workload would be found among recent answers.
    numbers = random.Random(f"{name} {seed}")
    words = [word for line in (Path(__file__).parent / "texts" / "calibration.jsonl").read_text().splitlines()
             for word in json.loads(line)["text"].split()]  # fmt: skip
    passage = numbers.choices(words, k=160)
    if name == "quote":
        prompt, answer = " ".join(passage), " ".join(passage)
    elif name == "edit":
        edited = [word if number % 12 else numbers.choice(words) for number, word in enumerate(passage)]
        prompt, answer = " ".join(passage), " ".join(edited)
    elif name in ("json", "schema"):
        items = [
            {"name": numbers.choice(words), "count": numbers.randrange(100), "in_stock": numbers.random() < 0.5}
            for _ in range(30)
        ]
        prompt, answer = "List what there is as JSON.", json.dumps(items, ensure_ascii=False)
    elif name == "code":
        texts = [text for path in CODE if len(text := path.read_text()) > 4 * MIN_CODE]
        text = texts[seed * 37 % len(texts)]
        begin = numbers.randrange(MIN_CODE, len(text) - MIN_CODE)
        prompt, answer = text[begin - MIN_CODE // 2 : begin], text[begin:]
    else:
        return numbers.choices(range(300, 4000), k=160), numbers.choices(range(300, 4000), k=ANSWER)
    return tokenizer.encode(prompt), tokenizer.encode(answer)[1 : ANSWER + 1]


WORKLOADS = ("quote", "edit", "json", "schema", "code", "random")


class Client:
    """An engine that guesses in one way, and a worker that times its tokens."""

    def __init__(self, loaded: LoadedModel, settings: Settings, method: str, compiler: GrammarCompiler) -> None:
        config = SpeculativeConfig.from_json(METHODS[method])
        self._run = GivenAnswers(PlanRunner(loaded.runner, compiler, guess_forced=method != "none"))
        self._engine = LocalEngine(
            loaded,
            settings,
            self._run,
            costs=StepCostModel(),
            speculation=Speculation.of(config, settings.max_num_seqs, loaded.plan.max_model_len),
        )
        self._submitted = 0

    def run(self, asked: list[tuple[list[int], list[int]]], name: str) -> Figures:
        """Answers these side by side."""
        first = self._submitted
        self._run.answers = {}
        for prompt, answer in asked:
            self._run.answers[self._submitted] = answer
            submit = Submit(
                sequence_id=self._submitted,
                token_ids=prompt,
                max_tokens=len(answer),
                sampling=SamplingParams(
                    temperature=1.0, seed=self._submitted, grammar=SCHEMA if name == "schema" else None
                ),
            )
            self._engine.submit(submit)
            self._submitted += 1
        times: list[list[tuple[float, int]]] = [[] for _ in asked]
        before = self._engine.scheduler.stats()
        left = len(asked)
        while left:
            for now, output in self._engine.turn():
                times[output.sequence_id - first].append((now, len(output.token_ids)))
                left -= output.finish_reason is not None
        after = self._engine.scheduler.stats()
        # With many streams, the prompts of the others and the last ones alone count too.
        begin, end = min(own[0][0] for own in times), max(own[-1][0] for own in times)
        counts = [count for own in times for at, count in own if at > begin]
        gaps = [
            (later[0] - earlier[0], later[1]) for own in times for earlier, later in itertools.pairwise(own) if later[1]
        ]
        of_tokens = [gap / count for gap, count in gaps for _ in range(count)]
        drafted = after.draft_tokens - before.draft_tokens
        return Figures(
            workload=name,
            streams=len(asked),
            method="",
            tokens_per_s=sum(counts) / (end - begin),
            itl_p99_ms=1e3 * _p99(of_tokens),
            gap_p99_ms=1e3 * _p99([gap for gap, _ in gaps]),
            tokens_per_step=sum(counts) / len(counts),
            acceptance=(after.accepted_tokens - before.accepted_tokens) / drafted if drafted else 0.0,
        )

    def close(self) -> None:
        """Gives everything back."""
        self._engine.close()


@contextmanager
def serving(loaded: LoadedModel, settings: Settings) -> Iterator[dict[str, Client]]:
    """An engine for each way of guessing, all on one network and cache, which only one uses at a time."""
    config = loaded.executor.model.config
    compiler = GrammarCompiler.for_tokenizer(Tokenizer.from_folder(DEMO), config.vocab_size, config.eos_token_ids)
    clients = {method: Client(loaded, settings, method=method, compiler=compiler) for method in METHODS}
    try:
        yield clients
    finally:
        for client in clients.values():
            client.close()


def measure(loaded: LoadedModel, settings: Settings, arguments: argparse.Namespace) -> list[Figures]:
    """All ways of guessing for all workloads."""
    tokenizer = Tokenizer.from_folder(DEMO)
    measured: dict[tuple[str, int, str], list[Figures]] = {}
    with serving(loaded, settings) as clients:
        for streams, name in itertools.product(arguments.streams, arguments.workloads):
            # The first round teaches what steps cost and how often guesses are right.
            for number in range(1 + arguments.rounds):
                asked = [workload(name, tokenizer, 1000 * number + stream) for stream in range(streams)]
                for method in arguments.methods:
                    figures = clients[method].run(asked, name)
                    if number:
                        measured.setdefault((name, streams, method), []).append(figures)
            for method in arguments.methods:
                print(_line(_median(measured[name, streams, method], method)), file=sys.stderr)
    return [_median(rounds, method) for (_, _, method), rounds in measured.items()]


def _p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


def _median(rounds: list[Figures], method: str) -> Figures:
    middle = {
        name: round(statistics.median(getattr(own, name) for own in rounds), 3)
        for name in ("tokens_per_s", "itl_p99_ms", "gap_p99_ms", "tokens_per_step", "acceptance")
    }
    return Figures(workload=rounds[0].workload, streams=rounds[0].streams, method=method, **middle)


def _line(own: Figures) -> str:
    return (
        f"| {own.workload} | {own.streams} | {own.method} | {own.tokens_per_s:,.0f} | {own.itl_p99_ms:.2f} "
        f"| {own.gap_p99_ms:.2f} | {own.tokens_per_step:.2f} | {own.acceptance:.0%} |"
    )


def table(measured: list[Figures]) -> str:
    """The figures as Markdown."""
    lines = [
        "| answers | streams | guesses | tokens/s | p99 ITL, ms a token | p99 gap, ms | tokens a step | right |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join([*lines, *map(_line, measured)])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speculation", description="Measure what guessing next tokens brings."
    )
    parser.add_argument("--checkpoint", choices=["demo", *RANDOM], default="demo", help="[default: %(default)s]")
    parser.add_argument(
        "--quantization", choices=["none", "int8", "int4"], default="none", help="[default: %(default)s]"
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64], help="[default: %(default)s]")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS, help="[default: all]")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="[default: all]")
    parser.add_argument(
        "--rounds", type=int, default=3, help="that count, after one that does not [default: %(default)s]"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all results as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="persimmon-speculation-") as scratch:
        folder = checkpoint_named(arguments.checkpoint, Path(scratch))
        settings = Settings(
            model=str(folder),
            quantization=arguments.quantization,
            max_model_len=1024,
            max_num_seqs=max(arguments.streams),
            kv_cache_memory=ByteSize(2 << 30),
        )
        loaded = load(settings, folder)
        measured = measure(loaded, settings, arguments)
    print(table(measured))
    figures = {
        "checkpoint": arguments.checkpoint,
        "quantization": arguments.quantization,
        "methods": {method: METHODS[method] for method in arguments.methods},
        "rounds": arguments.rounds,
        "measured": [asdict(own) for own in measured],
    }
    write_figures(arguments.out, figures)


if __name__ == "__main__":
    main()
