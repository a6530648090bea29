"""Memory for large tensors on a CPU: pages of their own, large ones, before they are needed, and back to the system."""

import ctypes
import errno
import logging
import math
import mmap
import os
import threading
from collections.abc import Generator, Sequence
from functools import cache

import torch

logger = logging.getLogger(__name__)

_LARGE_PAGE = 2 << 20

_OWN_PAGES = 128 << 10
"""Bytes from which a tensor has pages of its own: glibc's first limit for memory that it maps."""

POPULATE = "populate"
"""Name of the threads that `populate` starts."""

_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE, of Linux 5.14, which `mmap` does not name."""


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor on the CPU whose memory goes back to the system as soon as the tensor is freed.

    malloc maps large pieces too, but only until it has freed one: from then on it takes pieces of that size from its
    heap.  What loading borrows would leave holes there, of a size that differs from run to run.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _OWN_PAGES:
        return torch.empty(*shape, dtype=dtype)
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


def advise_large_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Asks the system to back a tensor's memory with large pages as it is first written; returns the tensor.

    What is read in pieces all over a large tensor, such as a KV cache, otherwise spends much of its time on looking up
    4 KiB pages.  A system without large pages ignores this.
    """
    begin = -(-tensor.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
    length = (tensor.data_ptr() + tensor.nbytes - begin) // _LARGE_PAGE * _LARGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE") and length > 0:
        _madvise()(begin, length, mmap.MADV_HUGEPAGE)
    return tensor


def populate(tensors: Sequence[torch.Tensor], threads: int) -> list[threading.Thread]:
    """Makes the system back tensors with memory now, in background threads; their contents do not change.

    Otherwise it does so page by page as they are first written, in the middle of steps, which on a virtual machine can
    take longer than what is computed.

    Args:
        tensors: of one size; what lies at the same place of each is populated together, from front to back.
        threads: how many.

    Returns:
        The threads, which have begun and end by themselves.
    """
    pieces, lock = _pieces(tensors), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                begin, length = next(pieces, (0, 0))
            if length == 0:
                return
            if _madvise()(begin, length, _POPULATE_WRITE) == 0:
                continue
            with lock:
                pieces.close()
            if (error := ctypes.get_errno()) != errno.EINVAL:  # which is an older system's answer
                logger.warning("cannot populate the memory of the KV cache in advance: %s", os.strerror(error))
            return

    started = [threading.Thread(target=work, name=POPULATE, daemon=True) for _ in range(threads)]
    for thread in started:
        thread.start()
    return started


def _pieces(tensors: Sequence[torch.Tensor]) -> Generator[tuple[int, int]]:
    """(address, bytes) of whole pages; keeps the tensors alive while it is in use."""
    for offset in range(0, max((tensor.nbytes for tensor in tensors), default=0), _LARGE_PAGE):
        for tensor in tensors:
            begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            length = min(_LARGE_PAGE, end - begin - offset)
            if length > 0:
                yield begin + offset, length


@cache
def _madvise() -> "ctypes._NamedFuncPointer":
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
