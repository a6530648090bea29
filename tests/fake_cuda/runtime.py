"""Stands in for `torch.cuda`, pinned memory and Triton's launches while the simulated GPU is there."""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace, TracebackType
from typing import Any
from unittest import mock

import torch
import triton.language as tl
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import Interval
from torch.overrides import _get_current_function_mode_stack
from torch.profiler import ProfilerActivity, profile
from torch.utils._device import DeviceContext
from triton.runtime import driver
from triton.runtime.interpreter import GridExecutor

from tests.fake_cuda.device import Event, FakeDevice, Graph, Pool
from tests.fake_cuda.tensors import CUDA, CudaMode, CudaTensor, Dispatcher


class _Generator(torch.Generator):
    """Of random numbers on the device; they come when the device gets to them, in the order they were asked for."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        made: _Generator = super().__new__(cls, "cpu")  # type: ignore[call-arg]
        return made

    def __init__(self, device: Any = "cpu") -> None:
        self._device = CUDA if torch.device(device).type == "cuda" else torch.device("cpu")

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._device


class _CaptureContext:
    """`torch.cuda.graph`."""

    def __init__(self, device: FakeDevice, graph: Graph, pool: Pool | None, **options: Any) -> None:
        self._device, self._graph, self._pool, self._options = device, graph, pool, options

    def __enter__(self) -> None:
        self._device.wait("capture")
        self._graph.capture_begin(self._pool, **self._options)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._graph.capture_end()
        else:
            self._graph.capture_fail()


class _Stream:
    """The only one."""

    cuda_stream = 0

    def __init__(self, device: FakeDevice) -> None:
        self._device = device

    def synchronize(self) -> None:
        self._device.wait("stream")

    def wait_event(self, event: Event) -> None:
        event.wait()

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self._device)
        event.record()
        return event


def _functions(device: FakeDevice) -> dict[str, Any]:
    """What replaces the attributes of `torch.cuda`."""
    properties = SimpleNamespace(
        name=device.name,
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=device.total_memory,
        L2_cache_size=60 << 20,
        shared_memory_per_block_optin=232_448,
        shared_memory_per_multiprocessor=233_472,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2048,
        warp_size=32,
    )
    stream = _Stream(device)

    # Classes, because annotations name them.
    class BoundEvent(Event):
        def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
            del blocking, interprocess
            super().__init__(device, enable_timing)

    class BoundGraph(Graph):
        def __init__(self, keep_graph: bool = False) -> None:
            del keep_graph
            super().__init__(device)

    class BoundCapture(_CaptureContext):
        def __init__(self, graph: Graph, pool: Pool | None = None, stream: Any = None, **options: Any) -> None:
            del stream
            super().__init__(device, graph, pool, **options)

    def of_index(index: Any = None) -> None:
        number = torch.device(index).index if isinstance(index, str) else getattr(index, "index", index)
        if number not in (None, 0):
            raise AssertionError("Invalid device id")

    def on_device(value: Any) -> Callable[..., Any]:
        def function(index: Any = None) -> Any:
            of_index(index)
            return value() if callable(value) else value

        return function

    return {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": of_index,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "get_device_name": on_device(device.name),
        "get_device_capability": on_device((9, 0)),
        "get_device_properties": on_device(properties),
        "synchronize": on_device(partial(device.wait, "synchronize")),
        "mem_get_info": on_device(lambda: (device.total_memory - device.allocated, device.total_memory)),
        "memory_allocated": on_device(lambda: device.allocated),
        "memory_reserved": on_device(lambda: device.allocated),
        "max_memory_allocated": on_device(lambda: device.peak),
        "max_memory_reserved": on_device(lambda: device.peak),
        "reset_peak_memory_stats": on_device(lambda: setattr(device, "peak", device.allocated)),
        "empty_cache": lambda: device.refuse_in_capture("emptying the cache"),
        "is_current_stream_capturing": lambda: device.capturing is not None,
        "current_stream": on_device(stream),
        "default_stream": on_device(stream),
        "graph_pool_handle": Pool,
        "CUDAGraph": BoundGraph,
        "graph": BoundCapture,
        "Event": BoundEvent,
    }


def _launch(dispatcher: Dispatcher, interpret: Callable[..., None], executor: Any, *args: Any, **kwargs: Any) -> None:
    """Queues what Triton would launch."""
    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
    if not any(isinstance(own, CudaTensor) for own in tensors):
        interpret(executor, *args, **kwargs)
        return
    for own in tensors:
        if not isinstance(own, CudaTensor):
            raise ValueError(f"Pointer argument of {executor.fn.__name__} cannot be accessed from Triton (cpu tensor?)")

    def host(each: Any) -> Any:
        return each.host if isinstance(each, CudaTensor) else each

    host_args, host_kwargs = [host(each) for each in args], {name: host(each) for name, each in kwargs.items()}
    inspect.getcallargs(
        executor.fn, *args, **{name: each for name, each in kwargs.items() if name in executor.arg_names}
    )

    def run() -> None:
        if dispatcher.device.interprets_kernels:
            interpret(executor, *host_args, **host_kwargs)

    dispatcher.enqueue(executor.fn.__name__, run, tensors)


def _pin_memory(dispatcher: Dispatcher, tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    del device
    if isinstance(tensor, CudaTensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    dispatcher.device.refuse_in_capture("allocating pinned memory")
    return tensor if dispatcher.is_pinned(tensor) else dispatcher.pin(tensor.clone())


def _with_index(each: Any) -> Any:
    """A device as CUDA's runtime would complete it."""
    return CUDA if each == "cuda" or (isinstance(each, torch.device) and each.type == "cuda") else each


def _from_data(make: Callable[..., torch.Tensor], data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
    """`torch.tensor`, which asks CUDA's runtime for the device before it asks anyone else."""
    if device is None:
        within = [mode.device for mode in _get_current_function_mode_stack() if isinstance(mode, DeviceContext)]
        device = within[-1] if within else None
    made = make(data, **options) if isinstance(data, CudaTensor) else make(data, device="cpu", **options)
    return made if device is None else made.to(device)


def _profiled(device: FakeDevice) -> dict[str, Any]:
    """Methods of `torch.profiler.profile`, which report the device's work instead of looking for CUDA's."""
    init, start, events = profile.__init__, profile.start, profile.events

    def init_on_host(own: Any, *, activities: Any = None, **options: Any) -> None:
        del activities
        init(own, activities=[ProfilerActivity.CPU], **options)

    def start_here(own: Any) -> None:
        own.first_on_device = len(device.traced)
        start(own)

    def events_of_both(own: Any) -> list[Any]:
        on_device = [
            SimpleNamespace(
                name=ran.name, device_type=DeviceType.CUDA, time_range=Interval(ran.begin * 1e6, ran.end * 1e6)
            )
            for ran in device.traced[own.first_on_device :]
        ]
        return [*(events(own) or ()), *on_device]

    return {"__init__": init_on_host, "start": start_here, "events": events_of_both}


@contextmanager
def patched(device: FakeDevice) -> Iterator[Dispatcher]:
    """Puts the device into torch and Triton, for this thread and those that start meanwhile."""
    dispatcher = Dispatcher(device)
    run = threading.Thread.run

    def run_with_device(thread: threading.Thread) -> None:
        with CudaMode(dispatcher) if CudaTensor.dispatcher is dispatcher else ExitStack():
            run(thread)

    interpret = GridExecutor.__call__

    def launch(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        _launch(dispatcher, interpret, executor, *args, **kwargs)

    move = torch.Tensor.to

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return move(tensor, *map(_with_index, args), **{name: _with_index(each) for name, each in kwargs.items()})

    with ExitStack() as stack:
        for name, function in _functions(device).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        patches: list[tuple[Any, str, Any]] = [
            (torch.version, "cuda", "13.0"),
            (torch, "Generator", _Generator),
            (torch, "tensor", partial(_from_data, torch.tensor)),
            (torch, "as_tensor", partial(_from_data, torch.as_tensor)),
            (torch.Tensor, "pin_memory", lambda own, device=None: _pin_memory(dispatcher, own, device)),
            (torch.Tensor, "to", to),
            (
                torch.Tensor,
                "cuda",
                lambda own, device=None, non_blocking=False: to(own, CUDA, non_blocking=non_blocking),
            ),
            (torch.Tensor, "is_pinned", lambda own, device=None: dispatcher.is_pinned(own)),
            (CudaTensor, "dispatcher", dispatcher),
            (GridExecutor, "__call__", launch),
            (threading.Thread, "run", run_with_device),
            # Kernels take the way of the interpreter where they ask what they are compiled for.
            (driver, "_active", SimpleNamespace(get_current_target=lambda: None)),
            # Programs of the interpreter run one after the other, so there is nothing to wait for.
            (tl.extra.cuda, "gdc_wait", lambda *_args, **_options: None),
            (tl.extra.cuda, "gdc_launch_dependents", lambda *_args, **_options: None),
        ]
        patches += [(profile, *method) for method in _profiled(device).items()]
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        stack.enter_context(CudaMode(dispatcher))
        yield dispatcher
