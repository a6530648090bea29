"""Tensors that lie in files, seen without being read: where their numbers are, and any of their rows when asked for.

Knows nothing of formats, which say where the numbers are.
"""

import io
import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from persimmon.kernels.cpu import pages
from persimmon.model.errors import CheckpointError
from persimmon.model.regular_file import check_regular

LFS_POINTER = b"version https://git-lfs"
"""How a file begins that stands for another one."""

_MAX_SMALL_FILE = 64 << 20


@dataclass(frozen=True)
class Region:
    """A stretch of a file: the whole of it, or a member of an archive that is not compressed.

    Attributes:
        path: the file.
        offset: where it begins, in bytes.
        length: its bytes.
        member: its name in the archive; empty for a whole file.
    """

    path: Path
    offset: int
    length: int
    member: str = ""

    @classmethod
    def of_file(cls, path: Path) -> "Region":
        """The whole of a file.

        Raises:
            CheckpointError: it is not a regular file, or cannot be read.
        """
        return cls(path, 0, check_regular(path))

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    @contextmanager
    def opened(self) -> Iterator[io.BufferedReader]:
        """The stretch as a file of its own, for reading.

        Raises:
            CheckpointError: the file cannot be read.
        """
        try:
            with self.path.open("rb", buffering=0) as file:
                yield io.BufferedReader(_Stretch(file, self.offset, self.length), 1 << 16)
        except OSError as error:
            raise CheckpointError(f"{self} cannot be read: {error.strerror or error}") from error


class _Stretch(io.RawIOBase):
    """A part of an open file, from an offset on."""

    def __init__(self, file: io.FileIO, offset: int, length: int) -> None:
        self._file = file
        self._offset = offset
        self._length = length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._position)]
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(view)
        self._position += count
        return count


@dataclass
class Storage:
    """Numbers of one type in a file.

    Attributes:
        dtype: their type.
        numel: how many.
        start: the first one's offset in bytes; below zero as long as it is not known.
    """

    dtype: torch.dtype
    numel: int
    start: int = -1

    @property
    def bytes(self) -> int:
        """Their size."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, of which any rows can be read.

    Attributes:
        region: the file.
        shape: as of the tensor, like dtype.
        stride: of its elements in the storage.
        offset: its first element in the storage.
        storage: the numbers it is a view of.
    """

    region: Region
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: Storage

    @classmethod
    def contiguous(cls, region: Region, shape: tuple[int, ...], storage: Storage) -> "StoredTensor":
        """The whole of a storage, the last dimension's elements side by side."""
        stride = tuple(math.prod(shape[dimension + 1 :]) for dimension in range(len(shape)))
        return cls(region=region, shape=shape, stride=stride, offset=0, storage=storage)

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored elements."""
        return self.storage.dtype

    @property
    def address(self) -> int:
        """Where the first element lies in the file, in bytes."""
        return self.region.offset + self.storage.start + self.offset * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop, contiguous, on the CPU, in the stored type; shape [stop - start, ...].

        Raises:
            CheckpointError: the file cannot be read, or has become shorter.
        """
        shape = (stop - start, *self.shape[1:])
        span = spanned(shape, self.stride)
        size = span * self.dtype.itemsize
        numbers = pages.empty((span,), self.dtype)
        with self.region.opened() as file:
            file.seek(self.storage.start + (self.offset + start * self.stride[0]) * self.dtype.itemsize)
            if file.readinto(numbers.view(torch.uint8).numpy().data) != size:
                raise damaged(self.region, "it ends within a tensor")
        return numbers.as_strided(shape, self.stride).contiguous()

    def mapped(self, *, scattered: bool = False) -> torch.Tensor:
        """The whole tensor, as a view of a mapping of the file: its pages go when the tensor does.

        Args:
            scattered: whether rows will be read here and there, so that the system reads nothing ahead.

        Raises:
            CheckpointError: the file cannot be read, or has become shorter.
        """
        size, start = self.dtype.itemsize, self.address
        count = spanned(self.shape, self.stride)
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        skipped = start % mmap.ALLOCATIONGRANULARITY
        try:
            with self.region.path.open("rb") as file:
                # Private, so that the tensor may be written like any other; nothing of that reaches the file.
                view = mmap.mmap(
                    file.fileno(),
                    skipped + count * size,
                    mmap.MAP_PRIVATE,
                    mmap.PROT_READ | mmap.PROT_WRITE,
                    offset=start - skipped,
                )
        except (OSError, ValueError) as error:  # ValueError: the file is shorter
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{self.region} cannot be read: {reason}") from error
        if scattered and hasattr(mmap, "MADV_RANDOM"):
            view.madvise(mmap.MADV_RANDOM)
        numbers = torch.frombuffer(view, dtype=self.dtype, count=count, offset=skipped)
        return numbers.as_strided(self.shape, self.stride)


def spanned(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from a tensor's first to its last one in the storage, both counted."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if math.prod(shape) else 0


def small_file(region: Region) -> bytes:
    """The content of a file that is read whole.

    Raises:
        CheckpointError: it cannot be read, or is far too large.
    """
    if region.length > _MAX_SMALL_FILE:
        raise CheckpointError(f"{region} has {region.length:,} bytes, too many for a file of that name")
    with region.opened() as file:
        return file.read()


def damaged(region: Region, reason: str) -> CheckpointError:
    """What to raise for a file that is not whole, or not of its format."""
    line = " ".join(reason.split()) or "unreadable"
    return CheckpointError(
        f"{region} is truncated or damaged ({region.length:,} bytes; {line[:200]}): copy or download it again"
    )


def lfs_pointer(region: Region) -> CheckpointError:
    """What to raise for a file that begins with LFS_POINTER."""
    return CheckpointError(f"{region} is a Git LFS pointer, not the weights: run `git lfs pull` where it was cloned")
