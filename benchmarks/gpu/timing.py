"""Times device work: calls captured in CUDA graphs, replayed in turn, clocked with events.

Knows nothing of what is called.  A CPU runs each call once, and its times mean nothing.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch

GRAPH_SECONDS = 2e-3
"""Minimum time of a replay; next to it the time to start one is negligible."""

MAX_CALLS = 512
MAX_ROTATIONS = 256

Call = Callable[[], object]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one call: the median over the replays, and the tenth and ninetieth of a hundred."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        """From microseconds."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])

    @property
    def seconds(self) -> float:
        """The median."""
        return self.median * 1e-6

    @property
    def columns(self) -> dict[str, float]:
        """As a table shows it."""
        return {"us": self.median, "us_p10": self.low, "us_p90": self.high}


def rotations(bytes_each: int, rotated_bytes: int) -> int:
    """How many sets of buffers calls take turns in, so that each finds its own in memory and not in a cache."""
    return min(MAX_ROTATIONS, max(2, math.ceil(rotated_bytes / max(bytes_each, 1))))


def rotate(make: Callable[[], T], bytes_each: int, rotated_bytes: int) -> list[T]:
    """That many of them."""
    return [make() for _ in range(rotations(bytes_each, rotated_bytes))]


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A graph of the calls in order, each of which has run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def time_variants(variants: Mapping[str, Sequence[Call]], device: torch.device, seconds: float) -> dict[str, Timing]:
    """Times what is to be compared, replay by replay in turn.

    Args:
        variants: by name, calls that do the same to different buffers.
        device: where they run.
        seconds: for each variant, of replays.

    Returns:
        The time of one call, by name.
    """
    if device.type != "cuda":
        return {name: Timing.of([_clock(call) for call in calls[:1]]) for name, calls in variants.items()}
    replays = {name: _Replay(calls) for name, calls in variants.items()}
    rounds = {name: min(50, max(5, math.ceil(seconds / replay.seconds))) for name, replay in replays.items()}
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in replays}
    for number in range(max(rounds.values())):
        for name, replay in replays.items():
            if number < rounds[name]:
                marks[name].append(replay.run())
    torch.cuda.synchronize()
    return {
        name: Timing.of([_milliseconds(begin, end) * 1e3 / replays[name].calls for begin, end in pairs])
        for name, pairs in marks.items()
    }


class _Replay:
    """A variant's graph, long enough to be clocked."""

    def __init__(self, calls: Sequence[Call]) -> None:
        for call in calls:
            call()
        torch.cuda.synchronize()
        self._graph = capture(calls)
        self.calls = len(calls)
        self.seconds = self._once()
        repeats = min(math.ceil(GRAPH_SECONDS / self.seconds), max(1, MAX_CALLS // len(calls)))
        if repeats > 1:
            self._graph = capture([*calls] * repeats)
            self.calls *= repeats
            self.seconds = self._once()

    def run(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = _events(2)
        begin.record()
        self._graph.replay()
        end.record()
        return begin, end

    def _once(self) -> float:
        """The second replay of two: the first also uploads the graph."""
        self.run()
        begin, end = self.run()
        torch.cuda.synchronize()
        return max(_milliseconds(begin, end) * 1e-3, 1e-6)


def time_loop(call: Call, device: torch.device, seconds: float, *, least: int = 3) -> Timing:
    """Times what no graph can hold, such as a step that the host builds, one after the other without waiting."""
    if device.type != "cuda":
        return Timing.of([_clock(call)])
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    single = time.perf_counter() - begin
    count = min(200, max(least, math.ceil(seconds / single)))
    events = _events(count + 1)
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return Timing.of([_milliseconds(one, other) * 1e3 for one, other in pairwise(events)])


def _events(count: int) -> list[torch.cuda.Event]:
    return [torch.cuda.Event(enable_timing=True) for _ in range(count)]  # type: ignore[no-untyped-call]


def _milliseconds(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
    elapsed: float = begin.elapsed_time(end)
    return elapsed


def _clock(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e6
