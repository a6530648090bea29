"""The files that a checkpoint's weights lie in: which ones, what their headers say, and their tensors one at a time.

Knows the formats, safetensors and PyTorch's pickled files, and nothing of the network.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from persimmon.model.errors import CheckpointError
from persimmon.model.json_object import JsonObject
from persimmon.model.regular_file import check_regular, open_regular
from persimmon.model.safetensors_file import DTYPES, read_safetensors_file
from persimmon.model.stored import StoredTensor
from persimmon.model.torch_file import named_tensors

# In the order Transformers looks for them: a folder may hold several formats of the same weights.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""The types that a network's tensors may have, by PyTorch's names, with the bytes of a number."""

MAX_TENSORS = 200_000
"""Of a file.  More than any network has; a header may name millions, and each is looked at."""

_ITEM_BYTES = BYTES | {"int8": 1, "int32": 4, "int64": 8}

_SAFETENSORS_DTYPES = {name: str(dtype).removeprefix("torch.") for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Header:
    """What a file says about a tensor before it is read; dtype is PyTorch's name of it, like "bfloat16"."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Its size, of the types that a network's and a quantized matrix's tensors may have."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


class WeightFile(Protocol):
    """A file of tensors."""

    @property
    def path(self) -> Path:
        """Where it lies."""

    def headers(self) -> dict[str, Header]:
        """The tensors of the file, in file order."""

    def tensors(self, names: frozenset[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Those of the file's tensors that are among the names, in file order."""

    def stored(self) -> Mapping[str, StoredTensor]:
        """The tensors of the file, to be read row by row."""


@dataclass(frozen=True)
class _SafetensorsFile:
    path: Path

    def headers(self) -> dict[str, Header]:
        with self._opened() as file:
            names = file.offset_keys()
            if len(names) > MAX_TENSORS:
                raise CheckpointError(f"{self.path} holds {len(names):,} tensors; at most {MAX_TENSORS:,} are read")
            slices = {name: file.get_slice(name) for name in names}
            return {
                name: Header(tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype()))
                for name, part in slices.items()
            }

    def tensors(self, names: frozenset[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in [name for name in self.headers() if name in names]:
            # A mapping keeps every page that was ever read, and a tensor keeps its mapping alive.  With a
            # mapping for each, the pages go when the tensor does.
            with self._opened() as file:
                tensor = file.get_tensor(name)
            yield name, tensor
            del tensor

    def stored(self) -> Mapping[str, StoredTensor]:
        return read_safetensors_file(self.path)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        _check_weights(self.path)
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise _damaged(self.path, error) from error
        except RuntimeError as error:  # PyTorch could not map it
            raise CheckpointError(f"{self.path} is too large to be mapped into memory: {error}") from error


@dataclass(frozen=True)
class _PickledFile:
    path: Path

    def headers(self) -> dict[str, Header]:
        return {
            name: Header(tensor.shape, str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self.stored().items()
        }

    def tensors(self, names: frozenset[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, stored in self.stored().items():
            if name in names:
                yield name, stored.mapped()

    def stored(self) -> Mapping[str, StoredTensor]:
        tensors = named_tensors(self.path)
        if len(tensors) > MAX_TENSORS:
            raise CheckpointError(f"{self.path} holds {len(tensors):,} tensors; at most {MAX_TENSORS:,} are read")
        return tensors


@dataclass(frozen=True)
class RenamedFile:
    """A file whose tensors have other names in it.

    Attributes:
        file: as it lies there.
        rename: the name to use for one in the file.
    """

    file: WeightFile
    rename: Callable[[str], str]

    @property
    def path(self) -> Path:
        """As in `WeightFile`."""
        return self.file.path

    def headers(self) -> dict[str, Header]:
        """As in `WeightFile`.

        Raises:
            CheckpointError: two tensors would have the same name.
        """
        headers: dict[str, Header] = {}
        for stored, header in self.file.headers().items():
            name = self.rename(stored)
            if name in headers:
                raise CheckpointError(f"{self.path}: tensor {stored} is there twice, under two spellings of its name")
            headers[name] = header
        return headers

    def tensors(self, names: frozenset[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """As in `WeightFile`."""
        stored = frozenset(name for name in self.file.headers() if self.rename(name) in names)
        for name, tensor in self.file.tensors(stored):
            yield self.rename(name), tensor
            del tensor

    def stored(self) -> Mapping[str, StoredTensor]:
        """As in `WeightFile`."""
        return {self.rename(name): tensor for name, tensor in self.file.stored().items()}


MAX_SHARDS = 10_000
"""Files of weights in one folder.  To look for 200,000 takes ten seconds."""


def find_weight_files(folder: Path) -> tuple[Path, tuple[WeightFile, ...], dict[str, str]]:
    """Finds a folder's weights, in the order of Transformers: safetensors first, a single file before shards.

    Returns:
        The file that lists the tensors (an index, or the only weight file), the weight files, and the index: tensor
        name -> file name, empty where there is none.

    Raises:
        CheckpointError: there are no weights, the index is not one, or names a file that is not there.
    """
    listing = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if listing is None:
        for name in WEIGHT_FILES:
            if os.path.lexists(folder / name):
                check_regular(folder / name)  # raises: it says what it is instead
        raise CheckpointError(f"{folder}: no weights; expected one of {', '.join(WEIGHT_FILES)}")
    if listing.suffix != ".json":
        return listing, (_weight_file(listing),), {}
    index = _read_index(listing)
    names = sorted(set(index.values()))
    if len(names) > MAX_SHARDS:
        raise CheckpointError(f"{listing} names {len(names):,} files; at most {MAX_SHARDS:,} are read")
    shards = [folder / name for name in names]
    missing = [shard.name for shard in shards if not os.path.lexists(shard)]
    if missing:
        raise CheckpointError(f"{folder / missing[0]} is missing, although {listing.name} names it{and_more(missing)}")
    for shard in shards:
        check_regular(shard)
    return listing, tuple(map(_weight_file, shards)), index


def and_more(names: Sequence[str]) -> str:
    """How many names there are beyond the first one, for a message that gives that."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _weight_file(path: Path) -> WeightFile:
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _PickledFile(path)


def _read_index(path: Path) -> dict[str, str]:
    """An index's weight_map: tensor name -> name of the shard, a file in the same folder."""
    index = JsonObject.read(path)
    if index is None:
        raise CheckpointError(f"{path} is missing")
    shards = index.table("weight_map")
    if shards is None or not all(map(_is_file_name, shards.values.values())):
        raise index.error("weight_map", "each tensor's name with the name of its shard, a file in the same folder")
    return shards.values


def _is_file_name(value: object) -> bool:
    """Whether a value names a file without leading to another folder."""
    return isinstance(value, str) and Path(value).name == value and value not in ("", "..") and "\0" not in value


def _check_weights(path: Path) -> None:
    with open_regular(path) as file:
        beginning = file.read(64)
    if beginning.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` where it was cloned")


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = next(iter(str(error).splitlines()), "").partition(". ")[0] or type(error).__name__
    size = path.stat().st_size
    return CheckpointError(
        f"{path} is truncated or damaged ({size:,} bytes; {reason[:200]}): copy or download it again"
    )
