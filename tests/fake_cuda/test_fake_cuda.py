"""What the simulated GPU computes, and what it refuses as a GPU would."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from tests.fake_cuda import FakeDevice, fake_cuda

GPU = torch.device("cuda", 0)


@triton.jit  # type: ignore[untyped-decorator]
def _double(target, source, elements, BLOCK: tl.constexpr):  # noqa: N803
    places = tl.arange(0, BLOCK)
    tl.store(target + places, 2 * tl.load(source + places, mask=places < elements), mask=places < elements)


@pytest.fixture
def gpu() -> Iterator[FakeDevice]:
    with fake_cuda(total_memory=1 << 20) as device, torch.inference_mode():
        yield device


def captured(*calls: Callable[[], object], pool: Any = None) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for call in calls:
            call()
    return graph


def recorded(*, timing: bool = False) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=timing)
    event.record()
    return event


def test_is_there_only_within_the_block() -> None:
    assert not torch.cuda.is_available()
    with fake_cuda():
        assert torch.cuda.is_available()
        assert torch.cuda.get_device_properties(0).name == "NVIDIA H200"
        tensor = torch.ones(2, device="cuda")
    assert not torch.cuda.is_available()
    with pytest.raises(RuntimeError, match="outside of fake_cuda"):
        tensor + 1


def test_computes_what_a_cpu_does(gpu: FakeDevice) -> None:
    x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    on_gpu = torch.nn.functional.linear(x.to(GPU), weight.to("cuda"))
    assert on_gpu.device == GPU
    assert torch.equal(on_gpu.cpu(), torch.nn.functional.linear(x, weight))
    chosen = on_gpu[torch.tensor([1], device=GPU)]
    _double[(1,)](chosen, on_gpu, 4, BLOCK=4)
    assert chosen.tolist() == [[10.0, 28.0, 46.0, 64.0]]
    half = torch.ones(2, 2, device=GPU, dtype=torch.float16)
    assert torch.mm(half, half, out_dtype=torch.float32).tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_attention_of_torch_computes_what_a_cpu_does() -> None:
    """Its parts make tensors of their own, in C++."""
    with fake_cuda():
        q = torch.arange(24.0).view(1, 2, 3, 4) / 24
        attend = torch.nn.functional.scaled_dot_product_attention
        moved = q.to("cuda")
        on_gpu = attend(moved, moved, moved, is_causal=True)
        torch.testing.assert_close(on_gpu.cpu(), attend(q, q, q, is_causal=True))


def test_devices_need_no_index() -> None:
    with fake_cuda():
        assert torch.ones(2, device="cuda").to(device="cuda", dtype=torch.float16, copy=True).device == GPU


def test_a_default_device_is_kept_to() -> None:
    with torch.device("cpu"):  # after which torch knows what makes tensors
        torch.tensor([1])
    with fake_cuda(), torch.device("cuda"):
        assert [torch.tensor([1]).device, torch.as_tensor([1]).device, torch.ones(1).device] == [GPU] * 3


def test_kernels_may_be_left_out() -> None:
    with fake_cuda(interprets_kernels=False) as gpu:
        made = torch.empty(4, device=GPU)
        _double[(1,)](made, made, 4, BLOCK=4)
        assert made.tolist() == [0.0] * 4
        assert [ran.name for ran in gpu.traced] == ["_double"]


def test_threads_see_it_too(gpu: FakeDevice) -> None:
    found: list[list[float]] = []
    thread = threading.Thread(target=lambda: found.append(torch.ones(2, device="cuda").tolist()))
    thread.start()
    thread.join()
    assert found == [[1.0, 1.0]]


class TestTheHost:
    def test_gets_nothing_before_it_has_waited(self, gpu: FakeDevice) -> None:
        on_host = torch.empty(2, dtype=torch.int64, pin_memory=True)
        on_host.copy_(torch.arange(2, device=GPU), non_blocking=True)
        copied = recorded()
        assert not copied.query()
        assert on_host.tolist() != [0, 1]
        copied.synchronize()
        assert on_host.tolist() == [0, 1]
        assert gpu.waits == ["event"]

    def test_waits_for_an_event_and_for_nothing_behind_it(self, gpu: FakeDevice) -> None:
        first = torch.zeros(2, device=GPU)
        before = recorded()
        first += 1
        behind = recorded()
        before.synchronize()
        assert before.query()
        assert not behind.query()

    def test_waits_where_memory_is_pageable(self, gpu: FakeDevice) -> None:
        for move in (lambda: torch.tensor([1], device=GPU), lambda: torch.ones(2).to(GPU, non_blocking=True)):
            gpu.waits.clear()
            move()
            assert gpu.waits == ["copy from pageable memory"]
        gpu.waits.clear()
        for size in (2, 1):
            torch.ones(1).expand(size).pin_memory().to(GPU, non_blocking=True)
        assert gpu.waits == []

    def test_must_not_write_pinned_memory_that_is_still_to_be_read(self, gpu: FakeDevice) -> None:
        source = torch.ones(2).pin_memory()
        target = torch.empty(2, device=GPU)
        target.copy_(source, non_blocking=True)
        source[0] = 5
        with pytest.raises(RuntimeError, match="before the device had read it"):
            torch.cuda.synchronize()

    def test_may_write_it_after_its_event(self, gpu: FakeDevice) -> None:
        source = torch.ones(2).pin_memory()
        target = source.to(GPU, non_blocking=True)
        recorded().synchronize()
        source[0] = 5
        assert target.tolist() == [1.0, 1.0]


class TestGraphs:
    def test_repeat_what_was_launched_on_the_same_memory(self, gpu: FakeDevice) -> None:
        source, target = torch.ones(4, device=GPU), torch.zeros(4, device=GPU)
        graph = captured(lambda: _double[(1,)](target, source, 4, BLOCK=4), lambda: target.add_(source.sum()))
        assert target.tolist() == [0.0] * 4
        for value in (1.0, 3.0):
            source.fill_(value)
            graph.replay()
            assert target.tolist() == [6 * value] * 4

    def test_read_pinned_memory_when_they_are_replayed(self, gpu: FakeDevice) -> None:
        source, target = torch.ones(2).pin_memory(), torch.zeros(2, device=GPU)
        graph = captured(lambda: target.copy_(source, non_blocking=True))
        for value in (3.0, 4.0):
            source.fill_(value)
            graph.replay()
            assert target.tolist() == [value, value]

    def test_leave_nothing_in_memory_that_no_tensor_holds(self, gpu: FakeDevice) -> None:
        source, results = torch.ones(2, device=GPU), []
        pool = torch.cuda.graph_pool_handle()
        first = captured(lambda: results.append(source + 1), pool=pool)
        first.replay()
        assert results[0].tolist() == [2.0, 2.0]
        second = captured(lambda: source + 2, pool=pool)
        second.replay()
        assert results[0].tolist() == [2.0, 2.0]
        results.clear()
        assert gpu.allocated == 3 * source.nbytes

    @pytest.mark.parametrize(
        "call",
        [
            lambda tensor: tensor.tolist(),
            lambda tensor: torch.cuda.synchronize(),
            lambda tensor: torch.cuda.Event().record(),
            lambda tensor: tensor.copy_(torch.ones(2)),
            lambda tensor: torch.tensor([1, 2], device="cuda"),
            lambda tensor: torch.ones(2).pin_memory(),
            lambda tensor: tensor[tensor > 0],
            lambda tensor: torch.cuda.empty_cache(),
        ],
    )
    def test_hold_nothing_that_makes_the_host_wait(
        self, gpu: FakeDevice, call: Callable[[torch.Tensor], object]
    ) -> None:
        tensor = torch.ones(2, device=GPU)
        with pytest.raises(torch.AcceleratorError, match="when stream is capturing"):
            captured(lambda: call(tensor))
        assert tensor.tolist() == [1.0, 1.0]

    def test_are_not_replayed_before_their_capture(self, gpu: FakeDevice) -> None:
        with pytest.raises(RuntimeError, match="without a preceding successful capture"):
            torch.cuda.CUDAGraph().replay()
        with pytest.raises(RuntimeError, match="empty"):
            captured()

    def test_are_not_replayed_on_memory_that_is_gone(self, gpu: FakeDevice) -> None:
        kept, lost = torch.ones(2, device=GPU), [torch.ones(2, device=GPU)]
        graph = captured(lambda: kept.add_(lost[0]))
        graph.replay()
        lost.clear()
        with pytest.raises(RuntimeError, match="memory that has been freed"):
            graph.replay()

    def test_only_take_time_when_nothing_happens_in_between(self) -> None:
        with fake_cuda(repeats_replays=False) as gpu:
            total = torch.zeros(1, device=GPU)
            graph = captured(lambda: total.add_(1))
            graph.replay()
            torch.cuda.synchronize()
            before = gpu.seconds
            graph.replay()
            assert total.item() == 1
            assert gpu.seconds > before
            total.add_(1)
            graph.replay()
            assert total.item() == 3


class TestEvents:
    def test_tell_the_time_between_them(self, gpu: FakeDevice) -> None:
        begin = recorded(timing=True)
        torch.ones(2, device=GPU)
        end = recorded(timing=True)
        torch.cuda.synchronize()
        assert begin.elapsed_time(end) == pytest.approx(1.5)

    @pytest.mark.parametrize(
        ("begin", "message"),
        [
            (lambda: recorded(), "enable_timing"),
            (lambda: torch.cuda.Event(enable_timing=True), "must be recorded"),
            (lambda: recorded(timing=True), "must be completed"),
        ],
    )
    def test_tell_none_without_a_cause(
        self, gpu: FakeDevice, begin: Callable[[], torch.cuda.Event], message: str
    ) -> None:
        with pytest.raises(RuntimeError, match=message):
            begin().elapsed_time(recorded(timing=True))


def test_tensors_of_two_devices_do_not_mix(gpu: FakeDevice) -> None:
    on_gpu, on_host = torch.ones(4, device=GPU), torch.ones(4)
    for call in (lambda: on_gpu + on_host, lambda: torch.equal(on_gpu, on_host), lambda: on_host.add_(on_gpu)):
        with pytest.raises(RuntimeError, match="same device"):
            call()
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        _double[(1,)](on_gpu, on_host, 4, BLOCK=4)
    with pytest.raises(TypeError, match="convert cuda:0"):
        on_gpu.numpy()


def test_memory_is_counted_and_ends(gpu: FakeDevice) -> None:
    half = torch.empty(1 << 19, dtype=torch.uint8, device=GPU)
    assert torch.cuda.mem_get_info() == (1 << 19, 1 << 20)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 20, dtype=torch.uint8, device=GPU)
    view = half[1:]
    del half
    assert torch.cuda.memory_allocated() == 1 << 19
    del view
    assert torch.cuda.memory_allocated() == 0


def test_what_nothing_has_written_is_no_number(gpu: FakeDevice) -> None:
    assert torch.empty(2, device=GPU).isnan().all()
    assert torch.empty(2, dtype=torch.int32, device=GPU).tolist() == [0x7F7F7F7F] * 2


def test_an_error_of_the_device_stays(gpu: FakeDevice) -> None:
    tensor = torch.ones(2, device=GPU)
    gpu.break_down()
    for _ in range(2):
        with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
            tensor.tolist()
