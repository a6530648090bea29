"""When requests are sent: in a closed loop by a number of streams, or in an open one at random times of a given rate.

Knows nothing of what they ask or what is answered; clock, sleep and the sending itself come in.
"""

import asyncio
import contextlib
import gc
import itertools
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass

from persimmon.server.bench.answer import RequestFailedError
from persimmon.server.bench.http_client import ConnectionPool, Endpoint, Response
from persimmon.server.bench.workload import Request

Send = Callable[[Request], Awaitable[Response]]
"""Sends one request and returns its whole response; RequestFailedError where there is none."""


@dataclass(frozen=True)
class Exchange:
    """A request and what became of it.

    Attributes:
        request: as sent.
        outcome: the whole response, or why there is none.
        scheduled: when it was to be sent, in seconds of time.perf_counter(); None in a closed loop.
    """

    request: Request
    outcome: Response | RequestFailedError
    scheduled: float | None = None

    @property
    def schedule_delay(self) -> float | None:
        """Seconds from when it was to be sent to when it was; None in a closed loop, or where it never was."""
        if self.scheduled is None or not isinstance(self.outcome, Response):
            return None
        return self.outcome.started - self.scheduled


Watch = Callable[[Exchange], None]
"""Receives every exchange as it ends."""


def ignore(_: Exchange) -> None:
    """A watch that does nothing."""


def poisson_arrivals(rate: float, seed: int | str) -> Iterator[float]:
    """The times of a Poisson process, without end: gaps are exponential.

    Args:
        rate: arrivals a second.
        seed: the same gives the same times.

    Yields:
        Seconds, the first 0.
    """
    dice = random.Random(seed)
    arrival = 0.0
    while True:
        yield arrival
        arrival += dice.expovariate(rate)


async def closed_loop(
    requests: Iterable[Request],
    streams: int,
    send: Send,
    *,
    duration_s: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    watch: Watch = ignore,
) -> list[Exchange]:
    """Each of some streams sends the next request when its last has been answered.

    Args:
        requests: what to send; may be endless if there is a duration.
        streams: most requests in flight.
        send: sends one.
        duration_s: no request is sent later than this after the start; None sends all.
        clock: the time in seconds.
        watch: receives every exchange.

    Returns:
        The exchanges in the order of the requests.
    """
    waiting = enumerate(requests)  # shared by all streams: each request is sent once
    done: dict[int, Exchange] = {}
    end = None if duration_s is None else clock() + duration_s

    async def stream() -> None:
        while end is None or clock() < end:
            index, request = next(waiting, (-1, None))
            if request is None:
                break
            done[index] = await _exchange(request, None, send)
            watch(done[index])

    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(stream())
    return [done[index] for index in sorted(done)]


async def open_loop(
    requests: Iterable[Request],
    arrivals: Iterable[float],
    send: Send,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    watch: Watch = ignore,
) -> list[Exchange]:
    """Sends each request at its time, whatever has become of those before.

    Args:
        requests: what to send, as long as there are arrivals.
        arrivals: seconds from the start, ascending; may not be endless where the requests are.
        send: sends one.
        clock: the time in seconds.
        sleep: waits for a number of seconds; 0 lets what was sent begin.
        watch: receives every exchange.

    Returns:
        The exchanges in the order of the requests.
    """
    start = clock()

    async def one(request: Request, scheduled: float) -> Exchange:
        exchange = await _exchange(request, scheduled, send)
        watch(exchange)
        return exchange

    tasks: list[asyncio.Task[Exchange]] = []
    async with asyncio.TaskGroup() as group:
        for request, arrival in zip(requests, arrivals, strict=False):
            await sleep(max(0.0, start + arrival - clock()))
            tasks.append(group.create_task(one(request, start + arrival)))
    return [task.result() for task in tasks]


async def _exchange(request: Request, scheduled: float | None, send: Send) -> Exchange:
    try:
        return Exchange(request, await send(request), scheduled)
    except RequestFailedError as error:
        return Exchange(request, error, scheduled)


@dataclass(frozen=True)
class ClosedLoop:
    """A load with a constant number of requests in flight."""

    streams: int

    def __post_init__(self) -> None:
        if self.streams < 1:
            raise ValueError(f"{self.streams} streams; expected at least 1")

    @property
    def offered(self) -> float:
        """The load as a number of `unit`."""
        return self.streams

    @property
    def unit(self) -> str:
        """What `offered` counts."""
        return "streams"


@dataclass(frozen=True)
class OpenLoop:
    """A load with a rate of requests per second at Poisson arrival times, whether earlier ones are answered or not.

    Attributes:
        rate: requests a second.
        seed: of the arrivals.
    """

    rate: float
    seed: int | str = 0

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1e6:
            raise ValueError(f"a rate of {self.rate:g} requests a second; expected more than 0 and at most 1000000")

    @property
    def offered(self) -> float:
        """The load as a number of `unit`."""
        return self.rate

    @property
    def unit(self) -> str:
        """What `offered` counts."""
        return "requests/s"


Load = ClosedLoop | OpenLoop


@dataclass(frozen=True)
class Limits:
    """When a load ends.

    Attributes:
        requests: most requests; None for any number.
        duration_s: no request is sent later than this; None for any time.
        timeout_s: a request that takes longer has failed.
    """

    requests: int | None = None
    duration_s: float | None = None
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.requests is None and self.duration_s is None:
            raise ValueError("the load has no end; give a number of requests or a duration")
        if self.requests is not None and self.requests < 1:
            raise ValueError(f"{self.requests} requests; expected at least 1")
        for name, seconds in {"duration": self.duration_s, "timeout": self.timeout_s}.items():
            if seconds is not None and not 0 < seconds < float("inf"):
                raise ValueError(f"a {name} of {seconds:g} seconds; expected more than 0")


@dataclass(frozen=True)
class Run:
    """What a load left.

    Attributes:
        exchanges: in the order of the requests.
        duration_s: from the first request sent to the last answer read.
        client_cpu_s: processor time that this process took in that time.
    """

    exchanges: tuple[Exchange, ...]
    duration_s: float
    client_cpu_s: float


async def drive(
    endpoint: Endpoint, requests: Iterable[Request], load: Load, limits: Limits, watch: Watch = ignore
) -> Run:
    """Puts a load on a server.

    Args:
        endpoint: the server.
        requests: what to send; may be endless.
        load: when.
        limits: for how long.
        watch: receives every exchange as it ends.
    """
    # Times and bodies are made before the clock starts, where their number is known.
    arrivals: list[float] = []
    if isinstance(load, OpenLoop):
        end = math.inf if limits.duration_s is None else limits.duration_s
        times = itertools.islice(poisson_arrivals(load.rate, load.seed), limits.requests)
        arrivals = list(itertools.takewhile(lambda arrival: arrival < end, times))
        requests = list(itertools.islice(requests, len(arrivals)))
    elif limits.requests is not None:
        requests = list(itertools.islice(requests, limits.requests))
    async with ConnectionPool(endpoint) as pool:

        async def send(request: Request) -> Response:
            timer = asyncio.timeout(limits.timeout_s)
            try:
                async with timer:
                    return await pool.post(request.path, request.body)
            except OSError as error:  # TimeoutError among them, and connecting has one of its own
                if timer.expired():
                    raise RequestFailedError(f"no complete answer within {limits.timeout_s:g} s") from None
                raise RequestFailedError("connection failed", str(error)) from None

        started, cpu_started = time.perf_counter(), time.process_time()
        with _uncollected():
            if isinstance(load, ClosedLoop):
                exchanges = await closed_loop(requests, load.streams, send, duration_s=limits.duration_s, watch=watch)
            else:
                exchanges = await open_loop(requests, arrivals, send, watch=watch)
        return Run(tuple(exchanges), time.perf_counter() - started, time.process_time() - cpu_started)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is collected in a block.

    What answers leave is kept, and the collector would look at all of it again and again: in an open loop of 600
    requests a second for half of the time that this client takes.  It would find nothing: requests leave no cycles.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
