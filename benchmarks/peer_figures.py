"""The figures of a comparison of servers: what one round measured, medians over rounds, ratios, floors, the table.

Knows no running server.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.machine import Rates, floor_tokens_per_s
from benchmarks.peer_servers import OURS, QUANTIZED, Contender
from benchmarks.serve import Round, Workload
from persimmon.model.config import PersimmonConfig
from persimmon.server.bench.report import Report

WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}
"""Of one weight of a layer, scales left out; lm_head has 8 bits where layers have 4."""


@dataclass(frozen=True)
class Measurement:
    """One measured round of one server.

    Attributes:
        server: its name.
        round: counted from 1.
        start_s: seconds from its start to its first healthy answer.
        report: the client's figures.
        server_cores: cores that the server kept busy, on average.
        other_cores: cores that other processes kept busy; a figure from a busy machine says little.
    """

    server: str
    round: int
    start_s: float
    report: Report[Workload]
    server_cores: float
    other_cores: float

    @property
    def figures(self) -> dict[str, float]:
        """The figures of the table, by title."""
        figures = {"output tokens/s": self.report.output_tokens_per_s, "requests/s": self.report.requests_per_s}
        for title, distribution in {
            "TTFT": self.report.ttft_ms,
            "ITL": self.report.itl_ms,
            "whole answer": self.report.e2e_ms,
        }.items():
            if distribution is not None:
                figures |= {f"{title} median, ms": distribution.median, f"{title} p99, ms": distribution.p99}
        tokens = max(1, self.report.output_tokens)
        return figures | {
            "tokens at once": 1 / self.report.chunks_per_token,
            "processor ms/token": 1e3 * self.server_cores * self.report.duration_s / tokens,
            "cores busy with serving": self.server_cores,
            "cores busy with other work": self.other_cores,
            "start to healthy, s": self.start_s,
        }


@dataclass(frozen=True)
class Agreement:
    """How many prompts of a round got the same text from this server and another.

    Greedy float32 answers part where two tokens nearly tie, so a few may differ; most must not.  Servers that quantize
    differently differ in most.
    """

    server: str
    round: int
    streams: int
    prompts: int
    same_text: int


@dataclass(frozen=True)
class Summary:
    """One figure of one server at one number of streams, over the rounds."""

    streams: int
    figure: str
    server: str
    median: float
    least: float
    most: float

    def __str__(self) -> str:
        digits = 1 if self.median >= 10 else 2
        return f"{self.median:,.{digits}f} ({self.least:,.{digits}f}-{self.most:,.{digits}f})"


def agreement(server: str, round_number: int, first: Round, second: Round) -> Agreement:
    """Compares the texts of two servers' answers to the same prompts; `server` names the second."""
    pairs = list(zip(first.answers, second.answers, strict=True))
    same = sum(one is not None and other is not None and one.text == other.text for one, other in pairs)
    return Agreement(
        server=server,
        round=round_number,
        streams=first.report.workload.streams,
        prompts=len(pairs),
        same_text=same,
    )


def summarize(measurements: list[Measurement]) -> list[Summary]:
    """Median, least and most of every figure, per number of streams and server, in the order measured."""
    samples: dict[tuple[int, str, str], list[float]] = {}
    for measured in measurements:
        for figure, value in measured.figures.items():
            samples.setdefault((measured.report.workload.streams, figure, measured.server), []).append(value)
    return [
        Summary(
            streams=streams,
            figure=figure,
            server=server,
            median=statistics.median(sample),
            least=min(sample),
            most=max(sample),
        )
        for (streams, figure, server), sample in samples.items()
    ]


def comparisons(contenders: Sequence[Contender]) -> list[tuple[str, str]]:
    """Whose figures are divided by whose: this server's by each peer's at its precision, and by its own first's."""
    ours = [contender for contender in contenders if contender.program == OURS]
    pairs = [
        (own.name, other.name)
        for own in ours
        for other in contenders
        if other.program != OURS and other.precision == own.precision
    ]
    return pairs + [(own.name, ours[0].name) for own in ours[1:]]


def table(summaries: Sequence[Summary], pairs: Sequence[tuple[str, str]] = ()) -> str:
    """The summaries side by side, as Markdown, with the ratios of medians of the servers in `pairs`."""
    rows: dict[tuple[int, str], dict[str, Summary]] = {}
    for summary in summaries:
        rows.setdefault((summary.streams, summary.figure), {})[summary.server] = summary
    servers = list(dict.fromkeys(summary.server for summary in summaries))
    ratios = [f"{one} / {other}" for one, other in pairs]
    lines = [
        "| " + " | ".join(["streams", "median (least-most)", *servers, *ratios]) + " |",
        "| ---: | --- |" + " ---: |" * (len(servers) + len(ratios)),
    ]
    for (streams, figure), by_server in rows.items():
        cells = [str(by_server.get(server, "")) for server in servers]
        cells += [_ratio(by_server.get(one), by_server.get(other)) for one, other in pairs]
        lines.append("| " + " | ".join([str(streams), figure, *cells]) + " |")
    return "\n".join(lines)


def _ratio(one: Summary | None, other: Summary | None) -> str:
    return f"{one.median / other.median:.2f}" if one and other and other.median else ""


@dataclass(frozen=True)
class Floor:
    """What the machine's own rates allow at one number of streams, and what share of it a server reached.

    Attributes:
        streams: requests in flight.
        server: its name.
        tokens_per_s: output tokens a second that reading the weights and multiplying by them allow; of 8 and 4 bits
            only reading counts, because integer products have a rate of their own.
        share: of those, in the median round; above 1 where the weights fit into the processor's cache.
    """

    streams: int
    server: str
    tokens_per_s: float
    share: float

    def __str__(self) -> str:
        return (
            f"{self.server} at {self.streams} streams: {self.share:.0%} of the {self.tokens_per_s:,.0f} tokens/s "
            "that this machine's memory and multipliers allow"
        )


def best_of(rates: list[Rates]) -> Rates:
    """The best that was seen before and after the rounds."""
    return Rates(max(each.read_gb_s for each in rates), max(each.matmul_gflop_s for each in rates), rates[0].dtype)


def floors_of(
    summaries: list[Summary],
    contenders: Sequence[Contender],
    config: PersimmonConfig,
    rates: Rates,
    arguments: argparse.Namespace,
) -> list[Floor]:
    """The machine's floor next to each server's output tokens per second.

    The rate of integer products is not measured: with quantized weights only one stream has a floor, memory's.
    """
    precisions = {contender.name: contender.precision for contender in contenders}
    floors = []
    for summary in summaries:
        if summary.figure != "output tokens/s":
            continue
        precision = precisions[summary.server]
        if precision in QUANTIZED and summary.streams > 1:
            continue
        most = floor_tokens_per_s(
            config,
            replace(rates, matmul_gflop_s=math.inf) if precision in QUANTIZED else rates,
            weight_bytes=WEIGHT_BYTES[precision],
            head_bytes=1.0 if precision in QUANTIZED else None,
            streams=summary.streams,
            # A shared beginning is computed once, which is next to nothing.
            input_len=sum(arguments.input_len) / 2,
            output_len=sum(arguments.output_len) / 2,
        )
        floors.append(
            Floor(
                streams=summary.streams,
                server=summary.server,
                tokens_per_s=round(most, 1),
                share=round(summary.median / most, 3),
            )
        )
    return floors
