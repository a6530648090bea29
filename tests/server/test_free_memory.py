"""Memory that was freed goes back to the system."""

import ctypes
import mmap

import pytest

from persimmon.server.free_memory import return_free_memory

MIB = 1 << 20


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
    return_free_memory()
    assert before - resident() > 32 * MIB
    libc.free(last)
