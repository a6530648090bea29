"""What all Triton kernels share on the host side: facts about the device, and the bounds their machine code keeps.

Knows no kernel.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

_MULTIPROCESSORS_WITHOUT_A_GPU = 132
"""An H100's, so that what is compiled or interpreted without a GPU is shaped like what runs there."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Most registers of a thread and bytes of shared memory of a program that a kernel's machine code may take.

    For the shapes of the 8B model on sm_80, sm_90 and sm_100; tests compile them and read the figures back.
    """

    registers: int
    shared_bytes: int


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of the device."""
    return _device_facts(device)[0]


def supports_pdl(device: torch.device) -> bool:
    """Whether kernels may start while their predecessor ends (programmatic dependent launch: sm_90 and later)."""
    return _device_facts(device)[1] >= 9


@lru_cache(maxsize=8)
def _device_facts(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return _MULTIPROCESSORS_WITHOUT_A_GPU, 0
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least `value`, for value >= 1."""
    return 1 << (value - 1).bit_length()
