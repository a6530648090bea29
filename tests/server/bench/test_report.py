"""Figures of answers whose times are known to the millisecond."""

from dataclasses import asdict, replace

from persimmon.server.bench.answer import Answer, RequestFailedError
from persimmon.server.bench.http_client import Response
from persimmon.server.bench.load import ClosedLoop, Exchange, OpenLoop, Run
from persimmon.server.bench.report import (
    Distribution,
    Report,
    read_exchanges,
    remarks,
    summarize,
    table_head,
    table_row,
)
from persimmon.server.bench.workload import Request
from tests.server.bench.fake_server import response, sse, text_chunk, usage_chunk

REQUEST = Request("/v1/completions", b"", None)


def answer(first: float, gap: float, tokens: int = 3) -> Answer:
    arrivals = tuple(10.0 + first + number * gap for number in range(tokens))
    return Answer(
        started=10.0, arrivals=arrivals, finished=arrivals[-1], text="text", prompt_tokens=5, completion_tokens=tokens
    )


def report(*answers: Answer | RequestFailedError, delays: tuple[float, ...] = ()) -> Report[None]:
    exchanges = tuple(Exchange(REQUEST, Response(started=1.0 + delay), scheduled=1.0) for delay in delays)
    return summarize(None, Run(exchanges, duration_s=2.0, client_cpu_s=0.5), answers)


def test_percentiles_are_those_between_the_nearest_figures() -> None:
    # 0 to 100 ms: each percentile is its own number.
    assert Distribution.of([number / 1000 for number in range(101)]) == Distribution(
        mean=50.0, median=50.0, p90=90.0, p99=99.0, max=100.0
    )
    assert Distribution.of([0.010, 0.020]) == Distribution(mean=15.0, median=15.0, p90=19.0, p99=19.9, max=20.0)
    assert Distribution.of([]) is None


def test_every_figure_is_what_its_name_says() -> None:
    figures = report(answer(0.1, 0.01), answer(0.3, 0.03))
    assert figures.requests_per_s == 1.0
    assert (figures.prompt_tokens, figures.output_tokens, figures.output_tokens_per_s) == (10, 6, 3.0)
    assert figures.ttft_ms is not None
    assert (figures.ttft_ms.median, figures.ttft_ms.max) == (200.0, 300.0)
    assert figures.itl_ms is not None
    assert (figures.itl_ms.mean, figures.itl_ms.max) == (20.0, 30.0)
    assert figures.tpot_ms is not None
    assert figures.tpot_ms.median == 20.0
    assert figures.e2e_ms is not None
    assert (figures.e2e_ms.median, figures.e2e_ms.max) == (240.0, 360.0)
    assert figures.schedule_delay_ms is None


def test_failures_are_counted_by_kind_with_an_example_and_leave_the_figures_alone() -> None:
    failures = [RequestFailedError("HTTP 503", f"request {number}") for number in range(2)]
    figures = report(answer(0.1, 0.01), *failures, RequestFailedError("no usage in the stream"))
    assert figures.errors == {"HTTP 503": 2, "no usage in the stream": 1}
    assert (figures.answered, figures.failed, figures.output_tokens) == (1, 3, 3)
    assert remarks(figures) == ["2 x HTTP 503: request 0", "1 x no usage in the stream"]


def test_responses_are_read_as_their_requests_expect() -> None:
    exchanges = [
        Exchange(Request("", b"", expected), response(sse(text_chunk("a"), usage_chunk(3), "[DONE]")))
        for expected in (None, 3, 4)
    ]
    exchanges.append(Exchange(REQUEST, RequestFailedError("connection failed")))
    kinds = [each.kind if isinstance(each, RequestFailedError) else "" for each in read_exchanges(exchanges)]
    assert kinds == ["", "", "3 tokens instead of the requested 4", "connection failed"]


def test_a_late_client_is_said_to_be_late() -> None:
    on_time, late = report(answer(0.1, 0.01), delays=(0.0, 0.002)), report(answer(0.1, 0.01), delays=(0.0, 0.3))
    assert remarks(on_time) == ["requests were sent 1.0 ms late (p50), 2.0 ms (p99)"]
    assert "cannot keep up" in remarks(late)[1]


def test_a_client_that_may_be_the_slow_part_is_said_to_be() -> None:
    busy = replace(report(answer(0.1, 0.01)), client_cpu_s=1.9)
    assert remarks(busy) == ["this client's only core was 95% busy: the server may be faster than this row shows"]


def test_chunks_of_several_tokens_are_remarked_on() -> None:
    (line,) = remarks(
        report(
            Answer(
                started=10.0, arrivals=(10.5, 10.6), finished=10.6, text="text", prompt_tokens=5, completion_tokens=5
            )
        )
    )
    assert line.startswith("2.5 tokens per chunk")
    assert "25.0 ms (p50)" in line


def test_rows_stand_under_their_titles() -> None:
    for load in (ClosedLoop(8), OpenLoop(0.5)):
        head, row = table_head(load).splitlines()[1], table_row(load, report(answer(0.1, 0.01)))
        assert len(head) == len(row)
        assert dict(zip(head.split(), row.split(), strict=True))["tokens/s"] == "1.5"
        assert row.split()[0] == f"{load.offered:g}"
        assert row.split()[3:6] == ["100.0"] * 3


def test_a_load_without_an_answer_has_a_row() -> None:
    nothing = report(RequestFailedError("HTTP 503"))
    assert table_row(ClosedLoop(8), nothing).split() == ["8", "0.00", "0.0", *["-"] * 9, "1"]
    assert asdict(nothing)["ttft_ms"] is None
