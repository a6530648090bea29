"""The figures of one load, from its exchanges, and their table.

Knows nothing of how requests are sent or results are stored.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from persimmon.server.bench.answer import Answer, RequestFailedError, read_answer
from persimmon.server.bench.http_client import Response
from persimmon.server.bench.load import Exchange, Load, Run

LoadFacts = TypeVar("LoadFacts")
LATE_MS = 50.0
"""Requests sent later than this after their time are not the Poisson arrivals that were asked for."""

BUSY_SHARE = 0.8
"""A client that is busy for more of the time may be what answers wait for."""


@dataclass(frozen=True)
class Distribution:
    """Milliseconds, over the requests or gaps of a load."""

    mean: float
    median: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Distribution | None":
        """The distribution of a sample, percentiles by linear interpolation; None for an empty one."""
        if not seconds:
            return None
        sample = np.asarray(seconds) * 1e3
        figures = (sample.mean(), *np.percentile(sample, (50, 90, 99)), sample.max())
        return cls(*(round(float(figure), 3) for figure in figures))


@dataclass(frozen=True)
class Report(Generic[LoadFacts]):
    """The figures of one load.

    Attributes:
        workload: what was sent and when, in the caller's terms.
        duration_s: from the first request sent to the last answer read.
        answered: requests answered as asked.
        errors: the others, by what went wrong.
        prompt_tokens: of the answered requests, by usage.
        output_tokens: of the answered requests, by usage.
        output_tokens_per_s: output_tokens / duration_s.
        requests_per_s: answered / duration_s.
        chunks_per_token: chunks with text per output token; below 1 where the server puts several into one.
        ttft_ms: time to first token, from sending the request.
        itl_ms: inter-token latency: gaps between consecutive chunks of an answer.
        tpot_ms: time per output token after the first, averaged per answer.
        e2e_ms: a whole answer, from sending the request.
        client_cpu_s: processor time that this client took in that time.
        schedule_delay_ms: how much later than planned requests were sent; None in a closed loop.
        error_examples: what one failure of each kind said.
    """

    workload: LoadFacts
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
    schedule_delay_ms: Distribution | None = None
    error_examples: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """Requests that were not answered as asked."""
        return sum(self.errors.values())


def read_exchanges(exchanges: Iterable[Exchange]) -> list[Answer | RequestFailedError]:
    """Each exchange's answer, or why it has none, in order."""
    return [_read(exchange) for exchange in exchanges]


def _read(exchange: Exchange) -> Answer | RequestFailedError:
    if not isinstance(exchange.outcome, Response):
        return exchange.outcome
    try:
        return read_answer(exchange.outcome, exchange.request.expected_tokens)
    except RequestFailedError as error:
        return error


def summarize(workload: LoadFacts, run: Run, answers: Sequence[Answer | RequestFailedError]) -> Report[LoadFacts]:
    """The figures of a run.

    Args:
        workload: what to say of it.
        run: as it was driven.
        answers: its exchanges, as `read_exchanges` reads them.
    """
    good = [answer for answer in answers if isinstance(answer, Answer)]
    failures = [answer for answer in answers if isinstance(answer, RequestFailedError)]
    output_tokens = sum(answer.completion_tokens for answer in good)
    return Report(
        workload=workload,
        duration_s=round(run.duration_s, 4),
        answered=len(good),
        errors=dict(Counter(failure.kind for failure in failures)),
        prompt_tokens=sum(answer.prompt_tokens for answer in good),
        output_tokens=output_tokens,
        output_tokens_per_s=round(output_tokens / run.duration_s, 2),
        requests_per_s=round(len(good) / run.duration_s, 4),
        chunks_per_token=round(sum(len(answer.arrivals) for answer in good) / max(output_tokens, 1), 4),
        ttft_ms=Distribution.of(_known(answer.time_to_first_token for answer in good)),
        itl_ms=Distribution.of([gap for answer in good for gap in answer.gaps]),
        tpot_ms=Distribution.of(_known(answer.time_per_output_token for answer in good)),
        e2e_ms=Distribution.of([answer.finished - answer.started for answer in good]),
        client_cpu_s=round(run.client_cpu_s, 4),
        schedule_delay_ms=Distribution.of(_known(exchange.schedule_delay for exchange in run.exchanges)),
        error_examples={failure.kind: failure.detail for failure in reversed(failures)},
    )


def _known(seconds: Iterable[float | None]) -> list[float]:
    return [each for each in seconds if each is not None]


def table_head(load: Load) -> str:
    """The two lines above the rows of such loads."""
    latencies = "".join(f"{title:^27}" for title in ("TTFT, ms", "ITL, ms", "whole answer, ms"))
    percentiles = f"{'p50':>9}{'p90':>9}{'p99':>9}" * 3
    return (
        f"{'load,':>10}{'':11}{'output':>10}{latencies}".rstrip()
        + f"\n{load.unit:>10}{'answers/s':>11}{'tokens/s':>10}{percentiles}{'failed':>8}"
    )


def table_row(load: Load, report: Report[LoadFacts]) -> str:
    """One load's figures."""
    latencies = "".join(_percentiles(each) for each in (report.ttft_ms, report.itl_ms, report.e2e_ms))
    throughput = f"{report.requests_per_s:>11.2f}{report.output_tokens_per_s:>10.1f}"
    return f"{load.offered:>10g}{throughput}{latencies}{report.failed:>8}"


def _percentiles(distribution: Distribution | None) -> str:
    if distribution is None:
        return f"{'-':>9}" * 3
    return "".join(f"{figure:>9.1f}" for figure in (distribution.median, distribution.p90, distribution.p99))


def remarks(report: Report[LoadFacts]) -> list[str]:
    """What the row does not say: failures, a client that was late or busy, chunks of several tokens."""
    lines = [
        f"{count} x {kind}{': ' + example if (example := report.error_examples.get(kind)) else ''}"
        for kind, count in report.errors.items()
    ]
    delay = report.schedule_delay_ms
    if delay is not None:
        lines.append(f"requests were sent {delay.median:.1f} ms late (p50), {delay.p99:.1f} ms (p99)")
        if delay.p99 > LATE_MS:
            lines.append(
                "this client cannot keep up: the server got a different load than the row states, so do not rely on it"
            )
    if report.client_cpu_s > BUSY_SHARE * report.duration_s:
        share = report.client_cpu_s / report.duration_s
        lines.append(f"this client's only core was {share:.0%} busy: the server may be faster than this row shows")
    if 0 < report.chunks_per_token < 0.9 and report.tpot_ms is not None:
        lines.append(
            f"{1 / report.chunks_per_token:.1f} tokens per chunk, and ITL is the time between chunks; "
            f"time per output token {report.tpot_ms.median:.1f} ms (p50), {report.tpot_ms.p99:.1f} ms (p99)"
        )
    return lines
