"""A simulated CUDA device, on which the code that only a GPU runs computes real numbers on a CPU.

    with fake_cuda() as gpu:
        ...  # torch.cuda.is_available(), tensors on "cuda", Triton launches, events, graphs, pinned memory

It is an H200 with one stream.  Kernels run in Triton's interpreter (TRITON_INTERPRET=1), everything else on the CPU,
so results can be compared with those of a CPU, bit for bit where the operations are the same.  Work is queued, and done
only when the host waits for it, as late as a GPU could: a host that reads or writes too early gets wrong numbers or an
error.  What raises as on a GPU:

- waiting, copying from or to pageable memory, pinning and recording events while a graph is captured
- replaying a graph that was not captured, or that uses memory which has been freed since
- the time between events that were not recorded, not made for timing, or not reached
- operations on tensors of two devices, a host tensor given to a kernel, `numpy()` of a device tensor, more memory than
  there is, and everything after `gpu.break_down()`, which leaves the device as an illegal access does
- and, more strictly than on a GPU: pinned memory that is written before a copy from it was done, and empty graphs

Memory that nothing has written yet holds NaN or enormous integers; so does pinned memory until its copy is done, and
what a graph leaves in memory that no tensor holds.  `gpu.waits` lists why the host waited so far, `gpu.traced` what
ran (torch's profiler reports it, too), `gpu.seconds` is its clock, on which each command takes 1.5 ms, and
`gpu.allocated` counts bytes.  What happens inside of kernels, in caches and between streams is not simulated.

It exists in this process only; `tests.fake_cuda.serving` starts an engine process that has one of its own.  It is
no use for tests of speed: an interpreted launch takes milliseconds.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from tests.fake_cuda.device import H200_BYTES, FakeDevice
from tests.fake_cuda.runtime import patched

__all__ = ["FakeDevice", "fake_cuda"]


@contextmanager
def fake_cuda(
    *,
    total_memory: int = H200_BYTES,
    blocking: bool = False,
    repeats_replays: bool = True,
    interprets_kernels: bool = True,
) -> Iterator[FakeDevice]:
    """Puts the device into torch and Triton, for this thread and for threads that start within the block.

    Args:
        total_memory: of the device, in bytes.
        blocking: whether launches run at once, as with CUDA_LAUNCH_BLOCKING=1: errors then show where they were made.
        repeats_replays: False makes a replay of the same graph compute nothing where nothing was launched since the one
            before but other replays, which is how code takes times; it only moves the clock.
        interprets_kernels: False makes Triton's kernels only take their time, and new memory hold zeros: enough to see
            that measurements run through, in a hundredth of the time.
    """
    device = FakeDevice(
        total_memory, blocking=blocking, repeats_replays=repeats_replays, interprets_kernels=interprets_kernels
    )
    with patched(device):
        yield device
