"""When requests are sent; the clock is one that tests turn."""

import asyncio
import gc
import itertools
import statistics

import pytest

from persimmon.server.bench.answer import RequestFailedError
from persimmon.server.bench.http_client import Response
from persimmon.server.bench.load import (
    ClosedLoop,
    Exchange,
    Limits,
    OpenLoop,
    closed_loop,
    drive,
    open_loop,
    poisson_arrivals,
)
from persimmon.server.bench.workload import Request
from tests.server.bench.fake_server import fake_server


class Clock:
    """A time that passes only in sleep, and there longer than asked for by a lag."""

    def __init__(self, lag: float = 0.0) -> None:
        self.now = 100.0
        self.lag = lag
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds + self.lag
        await asyncio.sleep(0)


def requests(count: int) -> list[Request]:
    return [Request("/v1/completions", str(number).encode(), None) for number in range(count)]


def test_arrivals_are_seeded_and_ascend_from_zero() -> None:
    arrivals = list(itertools.islice(poisson_arrivals(4.0, "seed"), 100))
    assert arrivals == list(itertools.islice(poisson_arrivals(4.0, "seed"), 100))
    assert arrivals != list(itertools.islice(poisson_arrivals(4.0, "other"), 100))
    assert arrivals[0] == 0.0
    assert arrivals == sorted(arrivals)


def test_gaps_between_arrivals_are_exponential() -> None:
    arrivals = list(itertools.islice(poisson_arrivals(4.0, 0), 20_001))
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    # An exponential's mean and standard deviation are equal; of 20,000 gaps both are within 4% in all but one of 1e6.
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.04)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.04)


def test_an_open_loop_sends_at_the_arrivals_whatever_is_unanswered() -> None:
    clock = Clock()
    sent: list[bytes] = []
    answered = asyncio.Event()

    async def send(request: Request) -> Response:
        sent.append(request.body)
        if len(sent) == 3:
            answered.set()
        await answered.wait()  # none is answered before the last is sent
        return Response(started=clock())

    asyncio.run(open_loop(requests(9), [0.0, 0.5, 2.0], send, clock=clock, sleep=clock.sleep))
    assert clock.slept == [0.0, 0.5, 1.5]
    assert sent == [b"0", b"1", b"2"]


def test_a_client_that_is_late_sends_at_once_and_reports_how_late() -> None:
    clock = Clock(lag=1.0)

    async def send(request: Request) -> Response:
        return Response(started=clock())

    exchanges = asyncio.run(open_loop(requests(3), [0.0, 0.25, 5.0], send, clock=clock, sleep=clock.sleep))
    assert clock.slept == [0.0, 0.0, 3.0]
    assert [exchange.scheduled for exchange in exchanges] == [100.0, 100.25, 105.0]
    assert exchanges[2].schedule_delay == 1.0
    assert all((exchange.schedule_delay or 0.0) >= 0.75 for exchange in exchanges)


def test_a_closed_loop_sends_each_request_once_and_keeps_their_order() -> None:
    async def send(request: Request) -> Response:
        await asyncio.sleep(0)
        if request.body == b"2":
            await asyncio.sleep(0)
        return Response(started=0.0)

    watched: list[Exchange] = []
    exchanges = asyncio.run(closed_loop(requests(5), 2, send, watch=watched.append))
    assert [exchange.request.body for exchange in exchanges] == [b"0", b"1", b"2", b"3", b"4"]
    assert len(watched) == 5
    assert {exchange.schedule_delay for exchange in exchanges} == {None}


def test_a_closed_loop_sends_nothing_after_its_duration() -> None:
    clock = Clock()

    async def send(request: Request) -> Response:
        await clock.sleep(1.0)
        return Response(started=clock())

    endless = itertools.cycle(requests(1))
    exchanges = asyncio.run(closed_loop(endless, 1, send, duration_s=2.5, clock=clock))
    assert len(exchanges) == 3


def test_a_failure_ends_no_stream() -> None:
    async def send(request: Request) -> Response:
        raise RequestFailedError("HTTP 503")

    exchanges = asyncio.run(closed_loop(requests(4), 2, send))
    assert [str(exchange.outcome) for exchange in exchanges] == ["HTTP 503"] * 4


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf")])
def test_loads_and_limits_that_make_no_sense_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        OpenLoop(wrong)
    with pytest.raises(ValueError, match="expected"):
        Limits(duration_s=wrong)
    with pytest.raises(ValueError, match="expected"):
        Limits(requests=1, timeout_s=wrong)
    with pytest.raises(ValueError, match="expected"):
        Limits(requests=0)
    with pytest.raises(ValueError, match="expected"):
        ClosedLoop(0)
    with pytest.raises(ValueError, match="the load has no end"):
        Limits()


def test_no_garbage_is_collected_while_a_load_lasts() -> None:
    collected: list[bool] = []

    async def run() -> None:
        async with fake_server() as (_, endpoint):
            limits = Limits(requests=2)
            await drive(endpoint, requests(2), ClosedLoop(1), limits, lambda _: collected.append(gc.isenabled()))

    asyncio.run(run())
    assert collected == [False, False]
    assert gc.isenabled()
