"""This server next to vLLM's CPU build and OpenVINO GenAI, each with and without guesses at next tokens.

    python -m benchmarks.peer_guesses --vllm VENV/bin/vllm --openvino VENV/bin/python --openvino-server SCRIPT \
        --streams 1 8 --rounds 3 --out benchmarks/results/NAME.json

vLLM guesses by n-grams, OpenVINO by prompt lookup, both up to 5 tokens; this server chooses how many pay.  All answer
greedily with the demo checkpoint in float32.  A prompt is one of benchmarks.speculation with the first 64 tokens of its
answer, so that the model has something to repeat; it then writes what it likes.  Servers run one at a time, as in
benchmarks.peers.
"""

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import DEMO
from benchmarks.instruction_sets import INSTRUCTION_SETS
from benchmarks.machine import device
from benchmarks.peer_figures import Measurement, summarize, table
from benchmarks.peer_servers import NO_GUESSES, OPENVINO, OURS, VLLM, Contender, Field, Limits
from benchmarks.peers import add_server_arguments, installed, measure_workload, now, run
from benchmarks.serve import Workload
from benchmarks.servers import running
from benchmarks.speculation import WORKLOADS, workload
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.bench.workload import Prompt, Request, request

PRECISION = "float32"
TEXTS = tuple(name for name in WORKLOADS if name != "schema")
"""The prompts of "schema" are those of "json"."""

BEGUN = 64
"""Tokens of a given answer that its prompt ends with."""

SEEDS = 1000
"""More prompts than a server gets of one kind."""

GUESSES: Mapping[str, Sequence[str]] = {
    OURS: ("--speculative-config", '{"method": "auto"}'),
    VLLM: (
        "--speculative-config",
        '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}',
    ),
    OPENVINO: ("--prompt-lookup", "5"),
}
"""The flags by which a program guesses, by its name."""


@dataclass(frozen=True)
class TextWorkload(Workload):
    """Prompts of one kind of text, and answers of a fixed length.

    Attributes:
        text: the kind, one of TEXTS.
    """

    text: str = TEXTS[0]

    def requests(self, model: str) -> list[Request]:
        """The requests, encoded before the clock starts."""
        asked = [workload(self.text, _tokenizer(), self.seed + number) for number in range(self.prompts)]
        prompts = [Prompt("prompt", prompt + answer[:BEGUN], self.output_len[0]) for prompt, answer in asked]
        return [request(model, prompt, ignore_eos=True) for prompt in prompts]


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


def workloads(arguments: argparse.Namespace, round_number: int) -> list[TextWorkload]:
    """What a server gets in a round: each kind of text at each number of streams; no prompt twice."""
    return [
        TextWorkload(
            prompts=arguments.prompts_per_stream * streams,
            streams=streams,
            output_len=(arguments.output_len, arguments.output_len),
            seed=SEEDS * (len(arguments.streams) * round_number + place),
            text=text,
        )
        for (place, streams), text in itertools.product(enumerate(arguments.streams), arguments.texts)
    ]


def contenders_of(arguments: argparse.Namespace, scratch: Path) -> list[Contender]:
    """The servers that the command line asks for, in the order in which they are measured.

    Raises:
        LookupError: no build of the C kernels is within the asked instructions.
        subprocess.CalledProcessError: a checkpoint could not be exported.
    """
    contenders: list[Contender] = []
    for guesses, suffix in ((GUESSES, ", guesses"), (NO_GUESSES, "")):
        field = Field(
            installed=installed(arguments, guesses),
            checkpoint=DEMO,
            limits=Limits(arguments.max_model_len, arguments.max_num_seqs),
            level=INSTRUCTION_SETS[arguments.instructions],
            scratch=scratch,
        )
        contenders += [
            replace(contender, server=replace(contender.server, name=contender.name + suffix))
            for contender in field.contenders(PRECISION)
        ]
    return [contender for contender in contenders if contender.name not in arguments.without]


def compare(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Runs all rounds, and prints a table for each kind of text after the last.

    Args:
        arguments: of the command line.
        scratch: an existing folder for exports and logs.

    Returns:
        What the JSON file holds.

    Raises:
        ServerFailedError: a server did not start, or a request failed.
        LookupError: no build of the C kernels is within the asked instructions.
        OSError: a server's program cannot be started.
        subprocess.CalledProcessError: a checkpoint could not be exported.
    """
    started = now()
    contenders = contenders_of(arguments, scratch)
    measured: dict[str, list[Measurement]] = {text: [] for text in arguments.texts}
    versions: dict[str, str] = {}
    for round_number in range(1, arguments.rounds + 1):
        for contender in contenders:
            log = scratch / f"{contender.name}.log"
            with running(contender.server, contender.checkpoint, log, arguments.start_timeout) as live:
                versions[contender.name] = contender.version or live.version
                for own in workloads(arguments, round_number):
                    measured[own.text].append(measure_workload(live, own, arguments.timeout, round_number)[0])
    summaries = {text: summarize(own) for text, own in measured.items()}
    first, *others = (contender.name for contender in contenders)
    for text, own_summaries in summaries.items():
        print(f"\n{text}:\n\n{table(own_summaries, [(first, other) for other in others])}")
    return {
        "started": started,
        "ended": now(),
        "device": device(),
        "servers": {
            contender.name: {"version": versions[contender.name], "command": contender.server.shown_command}
            for contender in contenders
        },
        "output_len": arguments.output_len,
        "summary": {text: [asdict(summary) for summary in own] for text, own in summaries.items()},
        "measurements": {text: [asdict(each) for each in own] for text, own in measured.items()},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peer_guesses",
        description="Measure this server and others on this CPU in turn, with and without guesses at next tokens.",
    )
    add_server_arguments(parser)
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=TEXTS, help="[default: all]")
    parser.add_argument(
        "--streams", type=int, nargs="+", default=[1, 8], metavar="N", help="requests in flight [default: 1 8]"
    )
    parser.add_argument(
        "--prompts-per-stream", type=int, default=4, metavar="N", help="requests of a stream [default: %(default)s]"
    )
    parser.add_argument("--output-len", type=int, default=128, help="tokens of an answer [default: %(default)s]")
    parser.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        help="seconds after which a request has failed [default: %(default)s]",
    )
    return parser


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    if (arguments.openvino is None) != (arguments.openvino_server is None):
        parser.error("--openvino and --openvino-server need each other")
    if min(arguments.rounds, arguments.prompts_per_stream, arguments.output_len, *arguments.streams) < 1:
        parser.error("--rounds, --prompts-per-stream, --output-len and --streams must be at least 1")
    return run(arguments, compare)


if __name__ == "__main__":
    sys.exit(main())
