import ctypes
import errno
import logging
import mmap
from pathlib import Path

import pytest
import torch

from persimmon.kernels.cpu import pages

MIB = 1 << 20


def pages_of(tensor: torch.Tensor) -> list[bool]:
    """Whether each of the pages that lie wholly in a tensor has memory."""
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    count = (tensor.data_ptr() + tensor.nbytes - begin) // mmap.PAGESIZE
    states = (ctypes.c_ubyte * count)()
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    assert mincore(begin, count * mmap.PAGESIZE, states) == 0
    return [bool(state & 1) for state in states]


def populate(tensors: list[torch.Tensor], threads: int) -> None:
    """To its end."""
    for thread in pages.populate(tensors, threads):
        thread.join()


@pytest.mark.parametrize("threads", [1, 3])
def test_populated_tensors_have_memory_for_every_page(threads: int) -> None:
    tensors = [torch.empty(33 * MIB + 5000 * number, dtype=torch.uint8) for number in (1, 2, 3)]
    assert not all(all(pages_of(tensor)) for tensor in tensors), "nothing was written yet"
    populate(tensors, threads)
    for tensor in tensors:
        assert all(pages_of(tensor))


def test_what_is_in_a_tensor_stays() -> None:
    tensor = torch.arange(3 * MIB, dtype=torch.int64)
    populate([tensor], 2)
    assert torch.equal(tensor, torch.arange(3 * MIB, dtype=torch.int64))


def test_tensors_smaller_than_a_page_are_left_alone() -> None:
    populate([torch.empty(8), torch.empty(0)], 1)


@pytest.mark.parametrize(("error", "lines"), [(errno.EINVAL, 0), (errno.ENOMEM, 1)])
def test_a_system_that_cannot_is_asked_once(
    error: int, lines: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def refuse(begin: int, length: int, advice: int) -> int:
        asked.append((begin, length, advice))
        ctypes.set_errno(error)
        return -1

    monkeypatch.setattr(pages, "_madvise", lambda: refuse)
    with caplog.at_level(logging.WARNING):
        populate([torch.empty(9 * MIB, dtype=torch.uint8)], 1)
    assert len(asked) == 1
    assert len(caplog.records) == lines


@pytest.mark.parametrize("numel", [0, 100, 40_000, 5_000_000])
def test_an_empty_tensor_can_be_written(numel: int) -> None:
    tensor = pages.empty((numel, 2), torch.float32)
    assert (tensor.shape, tensor.dtype) == ((numel, 2), torch.float32)
    assert tensor.fill_(2).sum() == 4 * numel


def test_memory_of_a_large_tensor_goes_back_when_it_is_freed() -> None:
    # malloc maps what is as large as what it has unmapped before no longer: it takes it from its heap.
    torch.empty(16 * MIB, dtype=torch.uint8)
    tensor = pages.empty((8 * MIB,), torch.uint8).fill_(1)
    resident = resident_kib()
    del tensor
    assert resident_kib() < resident - 7 * 1024


def resident_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])
