"""Addresses for the tensors of one launch, each in the middle of 4 PiB that belong to nothing else.

An address then tells which argument it was computed from and how far it strayed, to the byte: unlike red zones or
unmapped pages of the machine's own memory, a neighbour's memory is never in reach, and a tensor that is a part of
another ends where it ends.  Kernels never follow these addresses themselves.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from tests.kernels.interleaving.weak_memory import Elements, Storage

_BITS = 52
_MIDDLE = 1 << (_BITS - 1)
_ALIGNMENT = 4096


class AddressError(Exception):
    """An address outside the tensor that it was computed from, or not a multiple of its element's size."""


@dataclass(frozen=True, slots=True)
class _Argument:
    name: str
    tensor: torch.Tensor
    storage: Storage
    start: int
    """Offset in the storage, in bytes."""
    nbytes: int
    """From the first element to the end of the last one, gaps between them included."""
    address: int


class AddressSpace:
    """The tensors of one launch and their addresses."""

    def __init__(self) -> None:
        self._arguments: list[_Argument] = []
        self._storages: dict[int, Storage] = {}

    def place(self, name: str, tensor: torch.Tensor) -> int:
        """The address of a tensor's first element, as well aligned as in the machine's memory."""
        memory = tensor.untyped_storage().data_ptr()
        if memory not in self._storages:
            self._storages[memory] = Storage.of(tensor)
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        address = ((len(self._arguments) + 1) << _BITS) + _MIDDLE + tensor.data_ptr() % _ALIGNMENT
        self._arguments.append(
            _Argument(
                name=name,
                tensor=tensor,
                storage=self._storages[memory],
                start=int(tensor.storage_offset()) * tensor.itemsize,
                nbytes=(last + 1) * tensor.itemsize if tensor.numel() else 0,
                address=address,
            )
        )
        return address

    def find(self, addresses: np.ndarray, size: int) -> Iterator[tuple[np.ndarray | slice, Elements]]:
        """The elements of `size` bytes at addresses [n], tensor by tensor, each with its share of the n.

        Raises:
            AddressError: an element is not wholly inside its tensor, or not aligned.
        """
        numbers = addresses >> np.uint64(_BITS)
        different = np.unique(numbers).tolist()
        for number in different:
            which = slice(None) if len(different) == 1 else numbers == number
            if not 0 < number <= len(self._arguments):
                raise AddressError(f"{int(addresses[which][0]):#x} was not computed from any tensor of the launch")
            argument = self._arguments[number - 1]
            # The difference wraps to what is far behind the end where an address lies before the beginning.
            offsets = (addresses[which] - np.uint64(argument.address)).view(np.int64)
            outside = (offsets < 0) | (offsets + size > argument.nbytes)
            if outside.any():
                raise AddressError(_stray(argument, int(offsets[outside][0]), size))
            if (addresses[which] % np.uint64(size)).any():
                raise AddressError(f"elements of {size} bytes in `{argument.name}` are not aligned to their size")
            offsets += argument.start
            yield which, Elements(argument.storage, offsets, size)

    def real(self, addresses: np.ndarray) -> np.ndarray:
        """Addresses [n] in the machine's memory, of what `find` has accepted."""
        numbers = (addresses >> np.uint64(_BITS)).astype(np.int64) - 1
        moved = np.array([each.tensor.data_ptr() - each.address for each in self._arguments], np.int64)
        return addresses + moved[numbers].view(np.uint64)


def _stray(argument: _Argument, offset: int, size: int) -> str:
    after = offset - argument.nbytes
    where = f"{-offset} bytes before its beginning" if offset < 0 else f"{after} bytes after its end"
    what = f"{list(argument.tensor.shape)} {argument.tensor.dtype}"
    return f"{size} bytes at offset {offset} of `{argument.name}` ({what}), {where}"
