"""A load generator for any server with OpenAI's completions endpoint: speed and latency of streamed answers.

    python -m benchmarks.serve --url http://127.0.0.1:8000 --streams 64 --prompts 128 --out serve.json

Closed loop: each of N streams sends its next prompt when its last answer has ended.  Prompts are random token
ids, answers have a fixed length (temperature 0, ignore_eos).  A warm-up round with other prompts comes first.
Tokens are counted by the server's usage and compared with what was asked for: a server may put several into one
chunk.  Knows nothing of any one server.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks.streaming_client import Connection, Endpoint, Response

WARM_UP_SEED_OFFSET = 1_000_003


class RequestFailedError(Exception):
    """One request was not answered as asked; the message says how, in a form that can be counted."""


@dataclass(frozen=True)
class Workload:
    """What is sent.

    Attributes:
        prompts: requests in all.
        streams: requests in flight at any time.
        input_len: (least, most) token ids of a prompt, drawn uniformly.
        output_len: tokens asked for per answer.
        token_ids: (first, last + 1) of the ids that prompts are made of.
        seed: of the prompts.
    """

    prompts: int = 128
    streams: int = 64
    input_len: tuple[int, int] = (64, 64)
    output_len: int = 128
    token_ids: tuple[int, int] = (300, 4000)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.streams <= self.prompts:
            raise ValueError(f"{self.streams} streams for {self.prompts} prompts: it needs 1 <= streams <= prompts")
        if not 1 <= self.input_len[0] <= self.input_len[1]:
            raise ValueError(f"prompt lengths {self.input_len}: it needs 1 <= least <= most")
        if self.output_len < 1:
            raise ValueError(f"an output length of {self.output_len}: it needs at least 1")
        if not 0 <= self.token_ids[0] < self.token_ids[1]:
            raise ValueError(f"token ids {self.token_ids}: it needs 0 <= first < end")

    def bodies(self, model: str) -> list[bytes]:
        """The request bodies, encoded before the clock starts."""
        dice = random.Random(self.seed)
        return [
            json.dumps(
                {
                    "model": model,
                    "prompt": [dice.randrange(*self.token_ids) for _ in range(dice.randint(*self.input_len))],
                    "max_tokens": self.output_len,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
            ).encode()
            for _ in range(self.prompts)
        ]


@dataclass(frozen=True)
class Answer:
    """One streamed answer; times in seconds of time.perf_counter().

    Attributes:
        started: when the request was sent.
        arrivals: when each chunk with text was read.
        finished: when the response ended.
        text: all of it.
        prompt_tokens: by the server's usage.
        completion_tokens: by the server's usage.
    """

    started: float
    arrivals: tuple[float, ...]
    finished: float
    text: str
    prompt_tokens: int
    completion_tokens: int

    @property
    def time_to_first_token(self) -> float:
        """Seconds from sending the request to reading its first text."""
        return self.arrivals[0] - self.started

    @property
    def time_per_output_token(self) -> float | None:
        """Seconds per token after the first chunk; None for a one-token answer."""
        if self.completion_tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.completion_tokens - 1)


@dataclass(frozen=True)
class Distribution:
    """Milliseconds, over the requests or gaps of a round."""

    mean: float
    median: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Distribution | None":
        """The distribution of a sample; None for an empty one."""
        if not seconds:
            return None
        sample = np.asarray(seconds) * 1e3
        figures = (sample.mean(), np.median(sample), np.percentile(sample, 99), sample.max())
        return cls(*(round(float(figure), 3) for figure in figures))


@dataclass(frozen=True)
class Report:
    """The figures of one round.

    Attributes:
        workload: what was sent.
        duration_s: from the first request sent to the last answer read.
        answered: requests answered in full, with the number of tokens asked for.
        errors: the others, by what went wrong.
        prompt_tokens: of the answered requests, by usage.
        output_tokens: of the answered requests, by usage.
        output_tokens_per_s: output_tokens / duration_s.
        requests_per_s: answered / duration_s.
        chunks_per_token: chunks with text per output token; below 1 where the server puts several into one.
        ttft_ms: time to first token.
        itl_ms: inter-token latency: gaps between consecutive chunks of an answer.
        tpot_ms: time per output token after the first, averaged per answer.
        e2e_ms: a whole answer.
        client_cpu_s: processor time that this client took in that time.
    """

    workload: Workload
    duration_s: float
    answered: int
    errors: dict[str, int]
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    chunks_per_token: float
    ttft_ms: Distribution | None
    itl_ms: Distribution | None
    tpot_ms: Distribution | None
    e2e_ms: Distribution | None
    client_cpu_s: float

    def __str__(self) -> str:
        lines = [
            f"{self.answered} of {self.workload.prompts} requests answered in {self.duration_s:.2f} s, "
            f"{self.workload.streams} at a time, {self.output_tokens} tokens",
            f"{self.output_tokens_per_s:10.1f} output tokens/s",
            f"{self.requests_per_s:10.2f} requests/s",
        ]
        for title, distribution in {
            "time to first token": self.ttft_ms,
            "inter-token latency": self.itl_ms,
            "time per output token": self.tpot_ms,
            "whole answer": self.e2e_ms,
        }.items():
            if distribution is not None:
                lines.append(f"{distribution.median:10.1f} ms {title}, median; p99 {distribution.p99:.1f} ms")
        lines.append(f"{self.client_cpu_s:10.2f} s of processor time in this client")
        lines += [f"{count:10d} x {message}" for message, count in self.errors.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Round:
    """What came back: the figures, and each prompt's answer in order (None where the request failed)."""

    report: Report
    answers: tuple[Answer | None, ...]


def read_answer(response: Response, expected_tokens: int) -> Answer:
    """An answer from a whole response.

    Raises:
        RequestFailedError: an error response, an error in the stream, no usage, no text, or another number of
            tokens than expected.
    """
    if response.status != 200:
        raise RequestFailedError(f"HTTP {response.status}: {response.body.decode(errors='replace')[:300]}")
    arrivals: list[float] = []
    text: list[str] = []
    usage: dict[str, Any] | None = None
    for read_at, data in response.events():
        if data == b"[DONE]":
            break
        chunk = json.loads(data)
        if "error" in chunk:
            raise RequestFailedError(f"error in the stream: {json.dumps(chunk['error'])[:300]}")
        usage = chunk.get("usage") or usage
        piece = "".join(choice["text"] for choice in chunk["choices"])
        if piece:
            arrivals.append(read_at)
            text.append(piece)
    else:
        raise RequestFailedError("the stream ended without [DONE]")
    if usage is None:
        raise RequestFailedError("no usage in the stream, though stream_options.include_usage was set")
    if usage["completion_tokens"] != expected_tokens:
        raise RequestFailedError(f"{usage['completion_tokens']} tokens instead of the {expected_tokens} asked for")
    if not arrivals:
        raise RequestFailedError("no text in the stream")
    return Answer(
        started=response.started,
        arrivals=tuple(arrivals),
        finished=response.finished,
        text="".join(text),
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
    )


async def served_model(endpoint: Endpoint) -> str:
    """The name of the first model that the server lists.

    Raises:
        OSError: the server cannot be reached.
        RequestFailedError: it lists no model.
    """
    async with Connection(endpoint) as connection:
        response = await connection.get("/v1/models")
    try:
        return str(json.loads(response.body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise RequestFailedError(
            f"/v1/models lists no model (HTTP {response.status}: {response.body[:200]!r}); name one with --model"
        ) from None


async def measure(endpoint: Endpoint, model: str, workload: Workload, timeout_s: float = 600.0) -> Round:
    """Sends a workload and measures the answers.

    Args:
        endpoint: the server.
        model: the name to put into requests.
        workload: what to send.
        timeout_s: a request that takes longer is counted as an error.
    """
    bodies = workload.bodies(model)
    responses: list[Response | Exception | None] = [None] * len(bodies)
    waiting = iter(range(len(bodies)))

    async def stream() -> None:
        async with Connection(endpoint) as connection:
            for index in waiting:  # shared by all streams: each prompt is sent once
                try:
                    async with asyncio.timeout(timeout_s):
                        responses[index] = await connection.post("/v1/completions", bodies[index])
                except OSError as error:  # TimeoutError among them
                    responses[index] = error

    started, cpu_started = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for _ in range(workload.streams):
            group.create_task(stream())
    duration, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    return _read_round(workload, responses, duration, cpu, timeout_s)


def _read_round(
    workload: Workload,
    responses: Sequence[Response | Exception | None],
    duration: float,
    cpu: float,
    timeout_s: float,
) -> Round:
    answers: list[Answer | None] = []
    errors: Counter[str] = Counter()
    for response in responses:
        answer = None
        if isinstance(response, Response):
            try:
                answer = read_answer(response, workload.output_len)
            except RequestFailedError as error:
                errors[str(error)] += 1
        elif isinstance(response, TimeoutError):
            errors[f"no whole answer within {timeout_s:g} s"] += 1
        else:
            errors[str(response)] += 1
        answers.append(answer)
    good = [answer for answer in answers if answer is not None]
    output_tokens = sum(answer.completion_tokens for answer in good)
    gaps = [
        later - earlier for answer in good for earlier, later in zip(answer.arrivals, answer.arrivals[1:], strict=False)
    ]
    per_token = [answer.time_per_output_token for answer in good]
    report = Report(
        workload=workload,
        duration_s=round(duration, 4),
        answered=len(good),
        errors=dict(errors),
        prompt_tokens=sum(answer.prompt_tokens for answer in good),
        output_tokens=output_tokens,
        output_tokens_per_s=round(output_tokens / duration, 2),
        requests_per_s=round(len(good) / duration, 4),
        chunks_per_token=round(sum(len(answer.arrivals) for answer in good) / max(output_tokens, 1), 4),
        ttft_ms=Distribution.of([answer.time_to_first_token for answer in good]),
        itl_ms=Distribution.of(gaps),
        tpot_ms=Distribution.of([seconds for seconds in per_token if seconds is not None]),
        e2e_ms=Distribution.of([answer.finished - answer.started for answer in good]),
        client_cpu_s=round(cpu, 4),
    )
    return Round(report, tuple(answers))


async def warm_up(endpoint: Endpoint, model: str, workload: Workload, timeout_s: float = 600.0) -> None:
    """Sends a workload's like, with other prompts: the measured ones must not be in a prefix cache already."""
    other = replace(workload, seed=workload.seed + WARM_UP_SEED_OFFSET)
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


def number_range(text: str) -> tuple[int, int]:
    """Reads 64 or 32:512, for argparse."""
    least, _, most = text.partition(":")
    return int(least), int(most or least)


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
        type=int,
        default=defaults.output_len,
        help="tokens of an answer [default: %(default)s]",
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
            arguments.prompts,
            arguments.streams,
            arguments.input_len,
            arguments.output_len,
            arguments.token_ids,
            arguments.seed,
        )
    except ValueError as error:
        parser.error(str(error))
    try:
        report = uvloop.run(measure_warm(endpoint, arguments.model, workload, arguments.timeout)).report
    except (OSError, RequestFailedError) as error:
        print(f"{arguments.url}: {error}", file=sys.stderr)
        return 1
    print(report)
    if arguments.out:
        arguments.out.write_text(json.dumps(asdict(report), indent=2) + "\n")
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
