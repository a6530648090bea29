"""The closed-loop load of the comparison with other servers: a fixed number of prompts, and every answer kept.

    python -m benchmarks.serve --url http://127.0.0.1:8000 --streams 64 --prompts 128 --out serve.json

It is `persimmon bench`'s client with a workload that answers can be compared in: prompts are random token ids, answers
have a fixed length (temperature 0, ignore_eos).  A warm-up round with other prompts comes first.  Tokens are counted by
the server's usage and compared with what was asked for: a server may put several into one chunk.  Knows nothing of any
one server.
"""

import argparse
import itertools
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import uvloop

from persimmon.server.bench.answer import Answer, RequestFailedError
from persimmon.server.bench.arguments import number_range
from persimmon.server.bench.http_client import Endpoint
from persimmon.server.bench.load import ClosedLoop, Limits, drive
from persimmon.server.bench.probe import served_model
from persimmon.server.bench.report import Report, read_exchanges, summarize
from persimmon.server.bench.workload import RandomWorkload, Request, request

WARM_UP_SEED_OFFSET = 1_000_003


@dataclass(frozen=True)
class Workload:
    """What is sent.

    Attributes:
        prompts: requests in all.
        streams: requests in flight at any time.
        input_len: (least, most) token ids of a prompt, drawn uniformly.
        output_len: (least, most) tokens asked for per answer, drawn uniformly.
        prefix_len: tokens of a beginning that all prompts share; 0 for none.
        token_ids: (first, last + 1) of the ids that prompts are made of.
        seed: of the prompts.
    """

    prompts: int = 128
    streams: int = 64
    input_len: tuple[int, int] = (64, 64)
    output_len: tuple[int, int] = (128, 128)
    prefix_len: int = 0
    token_ids: tuple[int, int] = (300, 4000)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.streams <= self.prompts:
            raise ValueError(f"{self.streams} streams for {self.prompts} prompts; expected 1 <= streams <= prompts")
        _ = self.random_workload  # refuses lengths and ids that make no sense

    @property
    def random_workload(self) -> RandomWorkload:
        """What the prompts are drawn from."""
        return RandomWorkload(self.input_len, self.output_len, self.prefix_len, token_ids=self.token_ids)

    def requests(self, model: str) -> list[Request]:
        """The requests, encoded before the clock starts."""
        prompts = itertools.islice(self.random_workload.prompts(self.seed), self.prompts)
        return [request(model, prompt, ignore_eos=True) for prompt in prompts]


def spread_around(mean: int) -> tuple[int, int]:
    """(least, most) tokens of answers of this mean length.

    Answers of one length end together, and a closed loop would ask in waves, which cost less than an open loop.
    """
    return max(1, mean // 2), max(1, 3 * mean // 2)


def describe(report: Report[Workload]) -> str:
    """A report in lines for people."""
    lines = [
        f"{report.answered} of {report.workload.prompts} requests answered in {report.duration_s:.2f} s, "
        f"{report.workload.streams} at a time, {report.output_tokens} tokens",
        f"{report.output_tokens_per_s:10.1f} output tokens/s",
        f"{report.requests_per_s:10.2f} requests/s",
    ]
    for title, distribution in {
        "time to first token": report.ttft_ms,
        "inter-token latency": report.itl_ms,
        "time per output token": report.tpot_ms,
        "whole answer": report.e2e_ms,
    }.items():
        if distribution is not None:
            lines.append(f"{distribution.median:10.1f} ms {title}, median; p99 {distribution.p99:.1f} ms")
    lines.append(f"{report.client_cpu_s:10.2f} s of processor time in this client")
    lines += [f"{count:10d} x {message}" for message, count in report.errors.items()]
    return "\n".join(lines)


@dataclass(frozen=True)
class Round:
    """What came back: the figures, and each prompt's answer in order (None where the request failed)."""

    report: Report[Workload]
    answers: tuple[Answer | None, ...]


async def measure(endpoint: Endpoint, model: str, workload: Workload, timeout_s: float = 600.0) -> Round:
    """Sends a workload and measures the answers.

    Args:
        endpoint: the server.
        model: the name to put into requests.
        workload: what to send.
        timeout_s: a request that takes longer is counted as an error.
    """
    requests = workload.requests(model)
    run = await drive(endpoint, requests, ClosedLoop(workload.streams), Limits(len(requests), timeout_s=timeout_s))
    answers = read_exchanges(run.exchanges)
    report = summarize(workload, run, answers)
    errors = Counter(str(answer) for answer in answers if isinstance(answer, RequestFailedError))
    return Round(
        replace(report, errors=dict(errors)),
        tuple(answer if isinstance(answer, Answer) else None for answer in answers),
    )


async def warm_up(endpoint: Endpoint, model: str, workload: Workload, timeout_s: float = 600.0) -> None:
    """Sends two prompts a stream of a workload's like, but others: the measured ones must not be in a prefix cache."""
    prompts = min(workload.prompts, 2 * workload.streams)
    other = replace(workload, prompts=prompts, seed=workload.seed + WARM_UP_SEED_OFFSET)
    await measure(endpoint, model, other, timeout_s)


async def measure_warm(endpoint: Endpoint, model: str | None, workload: Workload, timeout_s: float = 600.0) -> Round:
    """A warm-up round, then a measured one.

    Args:
        endpoint: the server.
        model: the name to put into requests; None takes the first that the server lists.
        workload: what to send.
        timeout_s: a request that takes longer is counted as an error.

    Raises:
        OSError: the server cannot be reached.
        RequestFailedError: no model was named and the server lists none.
    """
    model = model or await served_model(endpoint)
    await warm_up(endpoint, model, workload, timeout_s)
    return await measure(endpoint, model, workload, timeout_s)


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that describe a workload, all but the number of streams."""
    defaults = Workload()
    parser.add_argument("--prompts", type=int, default=defaults.prompts, help="requests in all [default: %(default)s]")
    parser.add_argument(
        "--input-len",
        type=number_range,
        default=defaults.input_len,
        metavar="N[:M]",
        help="token ids of a prompt, fixed or uniformly from a range [default: 64]",
    )
    parser.add_argument(
        "--output-len",
        type=number_range,
        default=defaults.output_len,
        metavar="N[:M]",
        help="tokens of an answer, fixed or uniformly from a range [default: 128]",
    )
    parser.add_argument(
        "--prefix-len",
        type=int,
        default=defaults.prefix_len,
        help="token ids that all prompts begin with, before their own [default: %(default)s]",
    )
    parser.add_argument(
        "--token-ids",
        type=number_range,
        default=defaults.token_ids,
        metavar="FIRST:END",
        help="ids that prompts are made of [default: 300:4000]",
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="seed of the prompts [default: %(default)s]")
    parser.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        help="seconds after which a request has failed [default: %(default)s]",
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve", description="Measure a server with OpenAI's completions endpoint."
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="base URL [default: %(default)s]")
    parser.add_argument("--model", help="name to put into requests [default: the first that the server lists]")
    parser.add_argument("--streams", type=int, default=64, help="requests in flight [default: %(default)s]")
    add_workload_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report as JSON")
    arguments = parser.parse_args()
    try:
        endpoint = Endpoint.from_url(arguments.url)
        workload = Workload(
            prompts=arguments.prompts,
            streams=arguments.streams,
            input_len=arguments.input_len,
            output_len=arguments.output_len,
            prefix_len=arguments.prefix_len,
            token_ids=arguments.token_ids,
            seed=arguments.seed,
        )
    except ValueError as error:
        parser.error(str(error))
    try:
        report = uvloop.run(measure_warm(endpoint, arguments.model, workload, arguments.timeout)).report
    except (OSError, RequestFailedError) as error:
        print(f"{arguments.url}: {error}", file=sys.stderr)
        return 1
    print(describe(report))
    if arguments.out:
        arguments.out.write_text(json.dumps(asdict(report), indent=2) + "\n")
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
