from benchmarks.overload import SETTLE_SECONDS, Cores, Result, describe, figures
from persimmon.server.bench.answer import RequestFailedError
from persimmon.server.bench.http_client import Response
from persimmon.server.bench.load import Exchange, Run
from persimmon.server.bench.workload import Request

ANSWER = (
    b'data: {"choices": [{"text": "one two"}]}\n\n'
    b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\ndata: [DONE]\n\n'
)


def exchange(outcome: Response | RequestFailedError) -> Exchange:
    return Exchange(Request("/v1/completions", b"{}", 2), outcome)


def answered(started: float, seconds: float) -> Exchange:
    return exchange(
        Response(started=started, finished=started + seconds, status=200, pieces=[(started + seconds / 2, ANSWER)])
    )


def test_goodput_is_of_whole_answers_that_ended_while_the_load_lasted() -> None:
    exchanges = (
        answered(100, 1),  # while it settled
        answered(101, SETTLE_SECONDS),
        answered(108, 1),
        answered(109, 2),  # after the load
        exchange(Response(started=105, finished=105.004, status=429, pieces=[(105.004, b"{}")])),
        exchange(Response(started=106, finished=106.001, status=503, pieces=[(106.001, b"{}")])),
        exchange(RequestFailedError("connection failed")),
    )
    result = figures(Run(exchanges, 12, 3), 7.0, 10, {"engine": 12.0})
    assert result.seconds == 10 - SETTLE_SECONDS
    assert result.answered_per_s == 2 / 5
    assert result.goodput_tokens_per_s == 4 / 5
    assert (result.refused, result.server_errors, result.other_failures) == (1, 1, {"connection failed": 1})
    assert result.refusal_ms == (4.0, 4.0, 4.0)
    assert result.ttft_ms == (500.0, 2500.0)
    assert result.busy_cores == {"client": 0.25, "engine": 1.0}


def test_it_is_said_which_cores_the_client_had_and_what_it_took_of_them() -> None:
    run = Run((answered(100, 1), answered(107, 1)), 10, 3)
    load = figures(run, None, 10, {"engine": 10.0})
    shared = describe(Result(command="persimmon", cores=Cores((0, 1), (0, 1)), peak=load, overload=load, memory=[]))
    assert "client and server share cores: 0,1 and 0,1" in shared
    assert "cores busy, overload: client 0.30, engine 1.00; the client's are 15% of all" in shared
    apart = describe(Result(command="persimmon", cores=Cores((2, 3), (0, 1)), peak=load, overload=load, memory=[]))
    assert "the server has cores of its own, 0,1; the client has 2,3" in apart
