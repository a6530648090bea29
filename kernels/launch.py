"""What all Triton kernels share on the host side: facts about the device, and the bounds their machine code keeps.

Knows no kernel.
"""

import logging
import os
import re
import shutil
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

_MULTIPROCESSORS_WITHOUT_A_GPU = 132
"""An H100's, so that what is compiled or interpreted without a GPU is shaped like what runs there."""


MIN_CAPABILITY = (8, 0)
"""Compute capability from which on the kernels are compiled and tested."""

MIN_TRITON = "3.7.1"
"""Oldest release for compute capability 9.0 and later: the first with a proxy fence between asynchronous copies into
shared memory and the matrix products that read it by themselves, wgmma and tcgen05 (triton-lang/triton#9610)."""

logger = logging.getLogger(__name__)


class KernelsUnavailableError(RuntimeError):
    """A device's kernels cannot run here.  One line that says what is missing and what to do."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Most registers of a thread and bytes of shared memory of a program that a kernel's machine code may take.

    For the shapes of the 8B model on sm_80, sm_90 and sm_100; tests compile them and read the figures back.  Each
    module has a table by kernel name, where need be with the kind of call and the architecture: "name, 16 rows, sm_90".
    """

    registers: int
    shared_bytes: int


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of the device."""
    return _device_facts(device)[0]


def supports_pdl(device: torch.device) -> bool:
    """Whether kernels may start while their predecessor ends (programmatic dependent launch: sm_90 and later)."""
    return _device_facts(device)[1] >= 9


def generation(device: torch.device) -> int:
    """First part of its compute capability, 8 for 8.9; an H100's without a GPU."""
    return _device_facts(device)[1] or 9


def converts_fp8(device: torch.device) -> bool:
    """Whether the GPU converts float8_e4m3fn: from 8.9 on; Triton does not compile the type for older ones."""
    capability = _device_facts(device)[1:]
    return capability == (0, 0) or capability >= (8, 9)


def max_shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may take.

    CUDA C++ Programming Guide, technical specifications per compute capability: 227 KiB from 9.0 on, 163 KiB of 8.0
    and 8.7, 99 KiB of 8.6, 8.9 and 12.x.  Without a GPU an A100's, so that what is compiled fits sm_80 as well.
    """
    capability = _device_facts(device)[1:]
    if capability == (0, 0):
        return 163 * 1024
    if capability[0] in (9, 10, 11):
        return 227 * 1024
    return (163 if capability in ((8, 0), (8, 7)) else 99) * 1024


@lru_cache(maxsize=8)
def _device_facts(device: torch.device) -> tuple[int, int, int]:
    """Multiprocessors, and both parts of the compute capability."""
    if device.type != "cuda":
        return _MULTIPROCESSORS_WITHOUT_A_GPU, 0, 0
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major, properties.minor


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device; on a GPU by way of pinned memory, so that the host need not wait for the transfer."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def launch_options(pdl: bool) -> dict[str, bool]:
    """Options of a launch that may start while its predecessor ends, or may not."""
    return {"launch_pdl": True} if pdl else {}


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least `value`, for value >= 1."""
    return 1 << (value - 1).bit_length()


def check_gpu(name: str, capability: tuple[int, int], *, allow_old_triton: bool = False) -> None:
    """Makes sure that kernels can be compiled for a GPU, before anything is loaded onto it.

    Triton compiles a small C program for each kernel that it launches.

    Args:
        name: the GPU's, for the message.
        capability: its compute capability.
        allow_old_triton: log a warning instead of an error where Triton is older than MIN_TRITON.

    Raises:
        KernelsUnavailableError: the GPU or Triton is too old, or there is no C compiler or no Python.h.
    """
    if capability < MIN_CAPABILITY:
        raise KernelsUnavailableError(
            f"{name} has compute capability {capability[0]}.{capability[1]} and the kernels need "
            f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or later (A100, H100 and their like): use another "
            "GPU, or hide this one with CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    if capability >= (9, 0):
        _check_triton(name, allow_old=allow_old_triton)
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise KernelsUnavailableError(
            "there is no C compiler, which Triton needs for its kernels: install gcc, or name one in the variable CC"
        )
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = Path(sysconfig.get_path("include", scheme))
    if not (headers / "Python.h").exists():
        raise KernelsUnavailableError(
            f"{headers / 'Python.h'} is missing, which Triton needs for its kernels: install Python's headers "
            "(python3-dev on Debian and Ubuntu)"
        )


def _check_triton(name: str, *, allow_old: bool) -> None:
    import triton  # not needed on a CPU

    if _release(triton.__version__) >= _release(MIN_TRITON):
        return
    problem = (
        f"results on {name} could be wrong: Triton {triton.__version__} leaves out the fence between asynchronous "
        f"copies and the matrix products that read them, which {MIN_TRITON} and later have"
    )
    if not allow_old:
        raise KernelsUnavailableError(
            f"{problem}; install triton>={MIN_TRITON} with the PyTorch that brings it, or give --allow-old-triton to "
            "start nevertheless"
        )
    logger.warning("%s", problem)


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))
