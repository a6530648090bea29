"""A file that torch.save wrote -> its contents, with tensors that are read from the file row by row when asked.

Knows both of PyTorch's formats, the zip of 1.6 and later and the sequence of pickles before it.  Runs nothing
that a file names, and knows nothing of what the tensors are for.
"""

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from persimmon.model.errors import CheckpointError
from persimmon.model.pickle_reader import MAX_BYTES, Constructor, Global, PickleError, Record, read_pickle
from persimmon.model.stored import LFS_POINTER, Region, Storage, StoredTensor, damaged, lfs_pointer, spanned

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_DTYPES_OF_UNTYPED = {
    name: getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")
}
"""Types that have no storage class: the tensor names its type, and its storage is bytes."""

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


def read_torch_file(region: Region) -> Any:
    """What a file of torch.save holds: plain containers, StoredTensors, and Records of all other objects.

    The formats are those of torch/serialization.py: a zip with data.pkl and one file for each storage, or, up
    to PyTorch 1.5, pickles of a magic number, a version, the machine, the contents and the storages' keys, then
    the storages, each after its length.

    Raises:
        CheckpointError: the file cannot be read, is truncated, damaged, compressed or no such file at all.
    """
    with region.opened() as file:
        beginning = file.read(64)
        file.seek(0)
        if beginning.startswith(LFS_POINTER):
            raise lfs_pointer(region)
        try:
            reader = _ZipReader(region, file) if beginning.startswith(b"PK") else _LegacyReader(region, file)
            return reader.contents()
        # RuntimeError is what zipfile raises for a zip of a later version than it knows.
        except (ValueError, zipfile.BadZipFile, RuntimeError, struct.error, OverflowError) as error:
            raise damaged(region, str(error)) from error


def named_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file of weights as torch.save writes it, in file order.

    Raises:
        CheckpointError: as `read_torch_file`, or the file holds something other than tensors by name.
    """
    contents = read_torch_file(Region.of_file(path))
    if isinstance(contents, Record):
        raise _not_plain(path)
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} holds a {type(contents).__name__}; expected tensors by name")
    for name, tensor in contents.items():
        if isinstance(tensor, Record):
            raise _not_plain(path)
        if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
            kind = "Tensor" if isinstance(tensor, StoredTensor) else type(tensor).__name__
            raise CheckpointError(f"{path} holds a {kind} under {repr(name)[:80]}; expected tensors by name")
    return contents


def _not_plain(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is refused: it contains more than plain tensors, and reading that can run code; expected tensors by "
        f"name, preferably in safetensors format"
    )


class _Reader:
    """What both formats have in common: how tensors and their storages are written in a pickle."""

    def __init__(self, region: Region, file: io.BufferedReader) -> None:
        self._region = region
        self._file = file
        self._storages: dict[str, Storage] = {}
        self._typed: list[tuple[Storage, Storage]] = []  # storages of bytes, and the same with a type
        self._constructors: dict[Global, Constructor] = {
            Global("collections", "OrderedDict"): _ordered_dict,
            Global("torch", "Size"): _size,
            Global("torch._utils", "_rebuild_tensor"): self._tensor,
            Global("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            Global("torch._utils", "_rebuild_tensor_v3"): self._tensor_of_bytes,
            Global("torch._utils", "_rebuild_parameter"): _first,
            Global("torch._utils", "_rebuild_parameter_with_state"): _first,
        }

    def _read_pickle(self, file: BinaryIO) -> Any:
        return read_pickle(file, self._constructors, self._persistent)

    def _persistent(self, identity: Any) -> Any:
        """A storage: ("storage", its type, its key, the device it was on, its elements[, what it is a view of])."""
        match identity:
            case ("storage", Global(name=name), str(key), str(), int(numel)) | (
                "storage",
                Global(name=name),
                str(key),
                str(),
                int(numel),
                None,
            ) if numel >= 0:
                if name not in _DTYPES:
                    raise PickleError(f"it has tensors of the unknown type {name}")
                storage = Storage(_DTYPES[name], numel)
                known = self._storages.setdefault(key, storage)
                if (known.dtype, known.numel) != (storage.dtype, storage.numel):
                    raise PickleError(f"storage {key[:40]!r} is described in two ways")
                return known
            case ("module", *_):
                return Record(Global("torch.nn", "Module"))
        raise PickleError("it has a reference that does not name a storage")

    def _tensor(self, arguments: tuple[Any, ...]) -> StoredTensor:
        match arguments:
            case (Storage() as storage, int(offset), tuple(shape), tuple(stride), *_):
                numbers = (offset, *shape, *stride)
                if len(shape) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
                    raise PickleError("a tensor's shape or stride is not valid")
                if math.prod(shape) and offset + spanned(shape, stride) > storage.numel:
                    raise PickleError("a tensor extends beyond its storage")
                return StoredTensor(region=self._region, shape=shape, stride=stride, offset=offset, storage=storage)
        raise PickleError("a tensor's description is not valid")

    def _tensor_of_bytes(self, arguments: tuple[Any, ...]) -> StoredTensor:
        match arguments:
            case (Storage(dtype=torch.uint8) as storage, *view, _, _, Global(name=name)) | (
                Storage(dtype=torch.uint8) as storage,
                *view,
                _,
                _,
                Global(name=name),
                dict(),
            ):
                if name not in _DTYPES_OF_UNTYPED:
                    raise PickleError(f"it has tensors of the unknown type {name}")
                dtype = _DTYPES_OF_UNTYPED[name]
                typed = Storage(dtype, storage.numel // dtype.itemsize)
                self._typed.append((storage, typed))
                return self._tensor((typed, *view))
        raise PickleError("a tensor's description is not valid")

    def _place_typed(self) -> None:
        """Called when it is known where storages begin."""
        for storage, typed in self._typed:
            typed.start = storage.start


class _ZipReader(_Reader):
    """The format of PyTorch 1.6 and later."""

    def contents(self) -> Any:
        with zipfile.ZipFile(self._file) as archive:
            self._entries = {entry.filename: entry for entry in archive.infolist()}
            pickles = [name for name in self._entries if name.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1:
                raise PickleError("it is a zip file that torch.save did not write")
            prefix = pickles[0].removesuffix("data.pkl")
            if f"{prefix}byteorder" in self._entries:
                self._seek(f"{prefix}byteorder", 1)
                if self._file.read(6) != b"little":
                    raise PickleError("it is big-endian, which is not supported")
            size = self._seek(pickles[0], 0)
            contents = self._read_pickle(io.BytesIO(self._file.read(min(size, MAX_BYTES + 1))))
            for key, storage in self._storages.items():
                self._seek(f"{prefix}data/{key}", storage.bytes)
                storage.start = self._file.tell()
            self._place_typed()
            return contents

    def _seek(self, name: str, size: int) -> int:
        """Goes to where a member's bytes begin; its size in bytes, which has to be a given one at least."""
        entry = self._entries.get(name)
        if entry is None:
            raise PickleError(f"{name[:80]} is not in it")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise PickleError("it is compressed or encrypted, as torch.save never does")
        # The names' lengths here may be others than those in the directory, so they are read here.
        self._file.seek(entry.header_offset)
        header = self._file.read(30)
        if header[:4] != b"PK\x03\x04":
            raise PickleError(f"{name[:80]} is not at the place that its directory gives")
        self._file.seek(sum(struct.unpack("<HH", header[26:30])), io.SEEK_CUR)
        if entry.file_size < size or self._file.tell() + entry.file_size > self._region.length:
            raise PickleError(f"{name[:80]} is truncated")
        return entry.file_size


class _LegacyReader(_Reader):
    """The format before PyTorch 1.6."""

    def contents(self) -> Any:
        if self._read_pickle(self._file) != _LEGACY_MAGIC or self._read_pickle(self._file) != _LEGACY_PROTOCOL:
            raise PickleError("torch.save did not write it")
        machine = self._read_pickle(self._file)
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise PickleError("it is big-endian, which is not supported")
        contents = self._read_pickle(self._file)
        keys = self._read_pickle(self._file)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise PickleError("its storages are not named")
        for key in keys:
            storage = self._storages.get(key)
            (count,) = struct.unpack("<q", self._file.read(8))
            if storage is None or count != storage.numel:
                raise PickleError(f"storage {key[:40]!r} does not have the stated length")
            storage.start = self._file.tell()
            if storage.start + storage.bytes > self._region.length:
                raise PickleError(f"storage {key[:40]!r} is truncated")
            self._file.seek(storage.bytes, io.SEEK_CUR)
        absent = [key for key, storage in self._storages.items() if storage.start < 0]
        if absent:
            raise PickleError(f"storage {absent[0][:40]!r} is not in it")
        self._place_typed()
        return contents


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    match arguments:
        case ():  # filled by what follows; so Python 3
            return {}
        case (list(pairs),) if all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            if all(isinstance(key, str) for key, _ in pairs):
                return dict(pairs)  # so Python 2
    raise PickleError("it has an OrderedDict that is not valid")


def _size(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    match arguments:
        case (list() | tuple() as sizes,):
            return tuple(sizes)
    raise PickleError("it has a torch.Size that is not valid")


def _first(arguments: tuple[Any, ...]) -> Any:
    if not arguments:
        raise PickleError("it has a parameter without a tensor")
    return arguments[0]
