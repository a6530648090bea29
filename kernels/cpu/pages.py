"""Large pages for large tensors on a CPU, where the system offers them."""

import ctypes
import mmap
from functools import cache

import torch

_LARGE_PAGE = 2 << 20


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


@cache
def _madvise() -> "ctypes._NamedFuncPointer":
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
