from benchmarks.overload import SETTLE_SECONDS, figures
from server.bench.answer import RequestFailedError
from server.bench.http_client import Response
from server.bench.load import Exchange, Run
from server.bench.workload import Request

ANSWER = (
    b'data: {"choices": [{"text": "one two"}]}\n\n'
    b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\ndata: [DONE]\n\n'
)


def exchange(outcome: Response | RequestFailedError) -> Exchange:
    return Exchange(Request("/v1/completions", b"{}", 2), outcome)


def answered(started: float, seconds: float) -> Exchange:
    return exchange(Response(started, started + seconds, 200, [(started + seconds / 2, ANSWER)]))


def test_goodput_is_of_whole_answers_that_ended_while_the_load_lasted() -> None:
    exchanges = (
        answered(100, 1),  # while it settled
        answered(101, SETTLE_SECONDS),
        answered(108, 1),
        answered(109, 2),  # after the load
        exchange(Response(105, 105.004, 429, [(105.004, b"{}")])),
        exchange(Response(106, 106.001, 503, [(106.001, b"{}")])),
        exchange(RequestFailedError("connection failed")),
    )
    result = figures(Run(exchanges, 12, 1), 7.0, 10)
    assert result.seconds == 10 - SETTLE_SECONDS
    assert result.answered_per_s == 2 / 5
    assert result.goodput_tokens_per_s == 4 / 5
    assert (result.refused, result.server_errors, result.other_failures) == (1, 1, {"connection failed": 1})
    assert result.refusal_ms == (4.0, 4.0, 4.0)
    assert result.ttft_ms == (500.0, 2500.0)
