"""A step's inputs on their way to the device: a fixed buffer there, and two pinned ones on the host that take turns.

Knows nothing of what they hold.
"""

from typing import Generic, Protocol, TypeVar

import torch


class Buffer(Protocol):
    """What travels: [size] int32 words."""

    words: torch.Tensor


B = TypeVar("B", bound=Buffer)
B_co = TypeVar("B_co", bound=Buffer, covariant=True)


class MakeBuffer(Protocol[B_co]):
    """Makes a buffer on a device, or one of pinned host memory."""

    def __call__(self, *, device: torch.device, pinned: bool) -> B_co:
        """A new one, of zeros."""
        ...


class Staging(Generic[B]):
    """One buffer on the device, whose address never changes.

    The host writes one of its two buffers while the device may still be about to read the other.

    Args:
        make: makes each of the buffers.
        device: that reads them.

    Attributes:
        on_device: the device's.
    """

    def __init__(self, make: MakeBuffer[B], device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.on_device = make(device=device, pinned=False)
        self._hosts = [make(device=torch.device("cpu"), pinned=on_gpu) for _ in range(2)]
        self._read = [torch.cuda.Event() if on_gpu else None for _ in range(2)]  # type: ignore[no-untyped-call]

    def host(self) -> B:
        """The host's buffer that was sent before the last, as soon as the device has read it."""
        if self._read[0] is not None:
            self._read[0].synchronize()
        return self._hosts[0]

    def send(self, words: int) -> None:
        """Starts the transfer of the first words of what `host` returned, without waiting for it."""
        self.on_device.words[:words].copy_(self._hosts[0].words[:words], non_blocking=True)
        if self._read[0] is not None:
            self._read[0].record()
        self._hosts.reverse()
        self._read.reverse()
