"""Launches that a GPU repeats without the host: one CUDA graph for each of a few sizes.

A step runs in the smallest size that holds it, on fixed buffers.  Where nothing is captured, its launches are made
anew.  Knows no step.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch

T = TypeVar("T")


class Replayable(Protocol):
    """A CUDA graph, or what stands for one."""

    def replay(self) -> None:
        """Repeats the launches."""
        ...


class Record(Protocol):
    """Makes launches into a graph."""

    def __call__(self, run: Callable[[], T]) -> tuple[Replayable, T]:
        """The graph, and what `run` returned: tensors that each replay writes again."""
        ...


@dataclass(frozen=True, slots=True)
class _Captured(Generic[T]):
    graph: Replayable
    result: T


class Graphs(Generic[T]):
    """The same work in several sizes.

    Args:
        sizes: any number, without one nothing fits.
        run: launches the work of a size on fixed buffers; what it returns is overwritten by the next run.

    Attributes:
        sizes: in ascending order.
        replays: how many runs were replays of a graph.
    """

    def __init__(self, sizes: Sequence[int], run: Callable[[int], T]) -> None:
        self.sizes = sorted(set(sizes))
        self.replays = 0
        self._run_size = run
        self._captured: dict[int, _Captured[T]] = {}

    def takes(self, count: int) -> bool:
        """Whether there is a size that holds `count`."""
        return bool(self.sizes) and count <= self.sizes[-1]

    def size(self, count: int) -> int:
        """The smallest size that holds `count`."""
        return next(size for size in self.sizes if size >= count)

    def graph(self, count: int) -> Replayable | None:
        """The graph that holds `count`; None if nothing was captured."""
        captured = self._captured.get(self.size(count))
        return None if captured is None else captured.graph

    def capture(self, size: int, record: Record) -> None:
        """Captures one size."""
        self._captured[size] = _Captured(*record(partial(self._run_size, size)))

    def run(self, size: int) -> T:
        """Replays the graph of a size, or launches its work."""
        captured = self._captured.get(size)
        if captured is None:
            return self._run_size(size)
        captured.graph.replay()
        self.replays += 1
        return captured.result


class Captures(Protocol):
    """Work with graphs, on buffers that it fills with padding first."""

    @property
    def sizes(self) -> Sequence[int]:
        """Those that have a graph, in ascending order."""
        ...

    def capture(self, size: int, record: Record) -> None:
        """Captures one size."""
        ...


def capture_all(
    work: Sequence[Captures], record: Record, progress: Callable[[Sequence[int]], Iterable[int]] = iter
) -> None:
    """Captures every size, the largest of each kind first, so that the others fit into its memory.

    Args:
        work: what is captured, the kind that takes most memory first.
        record: makes the graphs.
        progress: wraps the graphs' numbers, to show progress.
    """
    graphs = [(own, size) for own in work for size in reversed(own.sizes)]
    for place in progress(range(len(graphs))):
        own, size = graphs[place]
        own.capture(size, record)


class GraphRecorder:
    """`Record` on a GPU; graphs of one recorder share memory, since only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], T]) -> tuple[Replayable, T]:
        """Runs once, which compiles kernels, and once more for the graph."""
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run()
        return graph, result
