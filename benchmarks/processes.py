"""What the processes of a server hold over time, memory and file descriptors, and the processor time they take.

Knows processes, and nothing of what they do.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Held:
    """What one process holds, and has taken.

    Attributes:
        rss_mib: resident memory, shared pages included.
        descriptors: open file descriptors.
        cpu_s: processor time that it has taken since it started.
    """

    rss_mib: float
    descriptors: int
    cpu_s: float


@dataclass(frozen=True)
class Sample:
    """What all processes hold at a moment.

    Attributes:
        seconds: since the start.
        held: by the process's part in the server.
    """

    seconds: float
    held: Mapping[str, Held]

    @property
    def line(self) -> str:
        """For people."""
        parts = [f"{name} {each.rss_mib:.1f} MiB, {each.descriptors} fds" for name, each in self.held.items()]
        return f"{self.seconds:8.0f} s  " + "; ".join(parts)


class Family:
    """The processes of a server.

    Args:
        process_id: of its first one, which starts the others.
    """

    def __init__(self, process_id: int) -> None:
        self._supervisor = psutil.Process(process_id)
        self._started = time.monotonic()
        self._engines: dict[int, bool] = {}

    def sample(self) -> Sample:
        """What they hold now."""
        held = {"supervisor": _held(self._supervisor)}
        workers = 0
        for child in self._supervisor.children():
            if "spawn_main" not in " ".join(child.cmdline()):
                continue  # Python's own tracker of resources
            if self._is_engine(child):
                held["engine"] = _held(child)
            else:
                held[f"api worker {workers}"] = _held(child)
                workers += 1
        return Sample(round(time.monotonic() - self._started, 1), held)

    def _is_engine(self, child: psutil.Process) -> bool:
        # Looked up once: the system walks through all pages of the process for it, which may hold up a step.
        if child.pid not in self._engines:
            self._engines[child.pid] = any("libtorch" in mapped.path for mapped in child.memory_maps())
        return self._engines[child.pid]


async def watch(family: Family, interval: float, samples: list[Sample]) -> None:
    """Adds a sample every `interval_s` seconds, until it is cancelled."""
    while True:
        samples.append(family.sample())
        await asyncio.sleep(interval)


def _held(process: psutil.Process) -> Held:
    times = process.cpu_times()
    memory = round(process.memory_info().rss / 2**20, 1)
    return Held(memory, process.num_fds(), round(times.user + times.system, 2))
