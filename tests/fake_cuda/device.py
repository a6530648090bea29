"""A GPU's memory, queue and graphs, simulated: work is queued when it is launched and done when the host waits for it.

Knows nothing of tensors' operations: a command is a function without arguments.
"""

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

H200 = "NVIDIA H200"
H200_BYTES = 150_754_820_096
"""Memory of an H200 as its driver reports it, in bytes."""

COMMAND_SECONDS = 1.5e-3
"""Time on the device's own clock that each command takes; long, so that code that repeats short work repeats little."""

POISONED_BYTES = 1 << 26
"""Larger allocations are left as the system gives them."""


class Memory:
    """An allocation; lives as long as a tensor that lies in it.

    Args:
        device: whose it is.
        nbytes: bytes that it takes of the device.

    Raises:
        torch.OutOfMemoryError: the device has less left.
    """

    def __init__(self, device: "FakeDevice", nbytes: int) -> None:
        if device.allocated + nbytes > device.total_memory:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {nbytes} bytes; "
                f"{device.total_memory - device.allocated} of {device.total_memory} are free."
            )
        self._device = device
        self._nbytes = nbytes
        device.allocated += nbytes
        device.peak = max(device.peak, device.allocated)

    def __del__(self) -> None:
        if hasattr(self, "_nbytes"):
            self._device.allocated -= self._nbytes


class Ran(NamedTuple):
    """Something that the device has done, and when by its own clock, in seconds."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Command:
    """Something that the device does.

    Attributes:
        name: of the kernel or operation.
        run: does it, on the host's memory.
        memories: what it reads and writes.
    """

    name: str
    run: Callable[[], object]
    memories: Sequence[Memory] = ()


@dataclass(slots=True)
class Event:
    """What `torch.cuda.Event` does, on the simulated clock."""

    device: "FakeDevice"
    enable_timing: bool = False
    recorded: int = 0
    reached: int = 0
    seconds: float = 0.0

    def record(self, stream: object = None) -> None:
        """Queues the event; the host may wait for it from now on."""
        del stream
        self.device.refuse_in_capture("recording an event")
        self.recorded += 1
        number = self.recorded

        def reach() -> None:
            self.reached, self.seconds = number, self.device.seconds

        self.device.enqueue(Command("event", reach))

    def query(self) -> bool:
        """Whether all work before the last record is done; without a record, there is none."""
        return self.reached == self.recorded

    def synchronize(self) -> None:
        """Waits for the work before the last record, and for no later work."""
        self.device.refuse_in_capture("waiting for an event")
        if not self.query():
            self.device.wait("event", until=self.query)

    def wait(self, stream: object = None) -> None:
        """Nothing to do: there is one stream."""
        del stream

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds between two events.

        Raises:
            RuntimeError: one of them was made without timing, was never recorded or has not been reached.
        """
        for event in (self, end):
            if not event.enable_timing:
                raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
            if not event.recorded:
                raise RuntimeError("Both events must be recorded before calculating elapsed time.")
            if not event.query():
                raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return (end.seconds - self.seconds) * 1e3


@dataclass(slots=True)
class _Node:
    """A command of a graph, without a hold on memory that lies outside of the graph's pool."""

    name: str
    run: Callable[[], object]
    outside: list["weakref.ref[Memory]"]


@dataclass(slots=True)
class _Pooled:
    """Memory that a graph owns, and whether a tensor of the program lies in it."""

    storage: torch.UntypedStorage
    held: "weakref.ref[Memory]"
    bytes_on_device: Memory


@dataclass(slots=True)
class Pool:
    """Memory that graphs share: what no tensor holds at the capture of one, is that one's as well."""

    memory: list[_Pooled] = field(default_factory=list)


class Graph:
    """What `torch.cuda.CUDAGraph` does: repeats what was launched while it was captured, on the same addresses.

    Args:
        device: that runs it.
    """

    def __init__(self, device: "FakeDevice") -> None:
        self._device = device
        self._nodes: list[_Node] = []
        self._scratch: list[_Pooled] = []
        self._pool = Pool()
        self._complete = False
        self._idle_since = -1

    def capture_begin(self, pool: Pool | None = None, capture_error_mode: str = "global") -> None:
        """Records from now on what is launched, instead of doing it.

        Raises:
            RuntimeError: another capture is under way, or this graph has been captured.
        """
        del capture_error_mode
        if self._device.capturing is not None:
            raise RuntimeError("a capture is under way already")
        if self._nodes:
            raise RuntimeError("This CUDAGraph instance already owns a captured graph")
        self._pool = pool or Pool()
        # What earlier graphs no longer need may become this one's.
        self._scratch = [pooled for pooled in self._pool.memory if pooled.held() is None]
        self._device.capturing = self

    def capture_end(self) -> None:
        """Ends the recording.

        Raises:
            RuntimeError: nothing was launched.
        """
        self._device.capturing = None
        if not self._nodes:
            raise RuntimeError("The CUDA Graph is empty: nothing was launched while it was captured")
        self._complete = True

    def capture_fail(self) -> None:
        """Ends the recording without a result."""
        self._device.capturing = None

    def add(self, command: Command) -> None:
        """Records a command."""
        pooled = {id(own.held()) for own in self._scratch}
        outside = [weakref.ref(memory) for memory in command.memories if id(memory) not in pooled]
        self._nodes.append(_Node(command.name, command.run, outside))

    def own(self, storage: torch.UntypedStorage, nbytes: int) -> Memory:
        """Memory of this graph's pool; what is returned tells how long a tensor lies in it."""
        held = Memory(self._device, 0)
        pooled = _Pooled(storage, weakref.ref(held), Memory(self._device, nbytes))
        self._scratch.append(pooled)
        self._pool.memory.append(pooled)
        return held

    def replay(self) -> None:
        """Queues everything again.

        Raises:
            RuntimeError: there is no capture, or it uses memory that has been freed since.
        """
        if not self._complete:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        self._device.refuse_in_capture("replaying a graph")
        for node in self._nodes:
            if any(memory() is None for memory in node.outside):
                raise RuntimeError(f"{node.name} of the captured graph uses memory that has been freed")
        if not self._device.repeats_replays and self._idle_since == self._device.eager_commands:
            self._device.enqueue(Command("replay", lambda: None), commands=len(self._nodes))
            return
        lost = [own.storage for own in self._scratch if own.held() is None]
        self._device.enqueue(Command("replay", lambda: self._run(lost)), commands=len(self._nodes))
        self._idle_since = self._device.eager_commands

    def pool(self) -> Pool:
        """The memory that it shares with graphs that are captured with it."""
        return self._pool

    def reset(self) -> None:
        """Forgets the capture."""
        self._nodes, self._scratch, self._complete = [], [], False

    def _run(self, lost: Sequence[torch.UntypedStorage]) -> None:
        # Others have used what no tensor holds.
        for storage in lost if self._device.interprets_kernels else ():
            _fill(storage, 0xFF)
        began = self._device.seconds - COMMAND_SECONDS * len(self._nodes)
        for number, node in enumerate(self._nodes):
            begin = began + number * COMMAND_SECONDS
            self._device.traced.append(Ran(node.name, begin, begin + COMMAND_SECONDS))
            node.run()


class FakeDevice:
    """The GPU.

    Args:
        total_memory: in bytes.
        blocking: whether each command is done when it is launched, so that an error shows where it was made.
        repeats_replays: whether a graph that is replayed again, though nothing has been launched in between, computes
            the same again, or only takes its time.
        interprets_kernels: whether Triton's kernels compute; new memory holds zeros where they do not.

    Attributes:
        allocated, peak: bytes in use, and the most there were.
        seconds: its clock.
        waits: why the host has waited, in order.
        traced: what has run, in order; of a graph all that it holds.
        capturing: the graph that records; None where none does.
        eager_commands: how many have been queued outside of graphs, events not counted.
    """

    def __init__(
        self, total_memory: int, *, blocking: bool, repeats_replays: bool, interprets_kernels: bool = True
    ) -> None:
        self.name = H200
        self.total_memory = total_memory
        self.repeats_replays = repeats_replays
        self.interprets_kernels = interprets_kernels
        self.allocated = self.peak = 0
        self.seconds = 0.0
        self.waits: list[str] = []
        self.traced: list[Ran] = []
        self.capturing: Graph | None = None
        self.eager_commands = 0
        self._blocking = blocking
        self._queue: deque[tuple[str, Callable[[], object], float]] = deque()
        self._broken: str | None = None

    def allocate(self, host: torch.Tensor) -> Memory:
        """Memory for a new tensor, which is full of what nothing should read."""
        storage = host.untyped_storage()
        if self.interprets_kernels:
            poison(storage, host.dtype)
        else:
            _fill(storage, 0)
        if self.capturing is not None:
            return self.capturing.own(storage, storage.nbytes())
        return Memory(self, storage.nbytes())

    def enqueue(self, command: Command, *, commands: int = 1) -> None:
        """Has the device do something after all that came before; or the graph that is being captured."""
        if self.capturing is not None:
            self.capturing.add(command)
            return
        if command.name not in ("event", "replay"):
            self.eager_commands += 1
        seconds = 0.0 if command.name == "event" else COMMAND_SECONDS * commands
        # Without its memory, which may go to others that are queued behind.
        self._queue.append((command.name, command.run, seconds))
        if self._blocking:
            self._run(lambda: False)

    def wait(self, why: str, until: Callable[[], bool] = lambda: False) -> None:
        """Does what is queued until a condition holds, as the host waits for it.

        Raises:
            torch.AcceleratorError: the device is broken, or a command failed; then it is broken from now on.
            RuntimeError: a capture is under way.
        """
        self.refuse_in_capture(why)
        self.waits.append(why)
        self._run(until)

    def refuse_in_capture(self, what: str) -> None:
        """Raises what CUDA raises for anything that no graph can hold."""
        if self.capturing is not None:
            raise torch.AcceleratorError(f"CUDA error: operation not permitted when stream is capturing ({what})")

    def break_down(self, reason: str = "an illegal memory access was encountered") -> None:
        """Fails as after a bad access: whatever the host waits for from now on is an error, until the process ends."""
        self._broken = reason

    def _run(self, until: Callable[[], bool]) -> None:
        with torch.utils._python_dispatch._disable_current_modes(), torch.inference_mode():
            while self._queue and not until():
                if self._broken is not None:
                    raise torch.AcceleratorError(f"CUDA error: {self._broken}")
                name, run, seconds = self._queue.popleft()
                self.seconds += seconds
                if name not in ("event", "replay"):
                    self.traced.append(Ran(name, self.seconds - seconds, self.seconds))
                try:
                    run()
                except Exception as error:
                    error.add_note(f"in {name}; with blocking=True it is raised where that is launched")
                    self.break_down("unspecified launch failure")
                    raise
        if self._broken is not None:
            raise torch.AcceleratorError(f"CUDA error: {self._broken}")


def poison(storage: torch.UntypedStorage, dtype: torch.dtype) -> None:
    """Fills memory with NaN, or with integers beyond any index."""
    if storage.nbytes() <= POISONED_BYTES:
        _fill(storage, 0xFF if dtype.is_floating_point else 1 if dtype == torch.bool else 0x7F)


def _fill(storage: torch.UntypedStorage, byte: int) -> None:
    torch.empty(0, dtype=torch.uint8).set_(storage).fill_(byte)
