import ctypes
import errno
import logging
import mmap

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


def test_free_memory_between_what_is_in_use_goes_back_to_the_system() -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("the C library has no malloc_trim")
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE

    size = 16 << 10  # too small for a mapping of its own
    pieces = [libc.malloc(ctypes.c_size_t(size)) for _ in range(64 * MIB // size)]
    for piece in pieces:
        ctypes.memset(piece, 1, size)
    *freed, last = pieces
    for piece in freed:
        libc.free(piece)
    before = resident()
    pages.return_free_memory()
    assert before - resident() > 32 * MIB
    libc.free(last)
