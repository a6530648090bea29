"""Tensors from any source -> a checkpoint folder in Hugging Face layout: safetensors shards, an index, small files.

Streams, verifies and resumes.  Knows nothing of where tensors come from or of what they mean.
"""

import contextlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.convert.sources import TensorSource
from persimmon.model.errors import CheckpointError
from persimmon.model.safetensors_file import DTYPES, read_safetensors_file
from persimmon.model.sizes import readable
from persimmon.model.tensor_names import stored_name
from persimmon.progress import progress_bar

MARKER = "conversion-in-progress.json"
"""Names the conversion that an unfinished folder belongs to. The last step deletes it."""

PREPARED = "conversion-in-progress"
"""A folder next to it, of what is made before any tensor is written."""

CHUNK_BYTES = 8 << 20
"""Maximum bytes of a tensor in memory at once, both in its stored type and in the new one."""

_SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Conversion:
    """What to write, and from what.

    Attributes:
        origin: the source and the settings, as JSON, which identify this conversion.
        config: of the network that is to be written.
        tensors: all of them, by their new names, in their new order.
        dtype: the type to store them in; None keeps each one's.
        max_shard_bytes: a file holds no more tensors than fit into this, but always one.
        files: the other files' contents by their names; config.json is one of them.
        unchanged: tensors that are stored in their own type whatever `dtype` is: parts of quantized matrices.
        prepare: makes what the tensors are read from, in a folder that is deleted in the end; it is given that folder
            and what takes a line of progress, and goes on where it was if it was cut off.
        prepared_bytes: maximum size of that folder.
        notes: lines for people on tensors of the source that were ignored, or used although config.json says otherwise.
    """

    origin: Mapping[str, Any]
    config: PersimmonConfig
    tensors: Mapping[str, TensorSource]
    dtype: torch.dtype | None
    max_shard_bytes: int
    files: Mapping[str, bytes]
    notes: tuple[str, ...] = ()
    unchanged: frozenset[str] = frozenset()
    prepare: Callable[[Path, Callable[[str], None]], None] | None = None
    prepared_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Size of all tensors as they will be stored."""
        return sum(map(self.bytes_of, self.tensors))

    def bytes_of(self, name: str) -> int:
        """Size of one tensor as it will be stored."""
        return math.prod(self.tensors[name].shape) * self.dtype_of(name).itemsize

    def dtype_of(self, name: str) -> torch.dtype:
        """The type one tensor will be stored in."""
        own = self.tensors[name].dtype
        return own if name in self.unchanged else self.dtype or own

    def shards(self) -> dict[str, list[str]]:
        """The tensors of each file, filled one after the other in the tensors' order."""
        shards: list[list[str]] = []
        left = 0
        for name in self.tensors:
            size = self.bytes_of(name)
            if not shards or size > left:
                shards.append([])
                left = self.max_shard_bytes
            shards[-1].append(name)
            left -= size
        if len(shards) == 1:
            return {"model.safetensors": shards[0]}
        return {
            f"model-{number:05}-of-{len(shards):05}.safetensors": names for number, names in enumerate(shards, start=1)
        }


def with_stored_names(conversion: Conversion) -> Conversion:
    """The conversion whose tensors have the names that Transformers gives them, where the network has others."""

    def stored(name: str) -> str:
        return stored_name(name, conversion.config)

    return replace(
        conversion,
        tensors={stored(name): tensor for name, tensor in conversion.tensors.items()},
        unchanged=frozenset(map(stored, conversion.unchanged)),
    )


def write(conversion: Conversion, out: Path, print_line: Callable[[str], None]) -> None:
    """Writes a checkpoint, reads it back and compares every number with its source.

    A shard is written under another name, reaches the disk, is compared and only then gets its own name.  So a
    conversion that was cut off goes on where it was: a shard with its own name is compared again, not written.
    What makes the folder a checkpoint, the index and config.json, is written last.

    Args:
        conversion: see there.
        out: a folder that is new, empty, or left by the same conversion.
        print_line: takes one line of progress.

    Raises:
        CheckpointError: the folder holds something else, its disk is too small, a file cannot be read or
            written, a value does not fit the new type, or what was read back is not what was written.
    """
    shards = conversion.shards()
    try:
        _claim(conversion, out, shards)
        files = "1 file" if len(shards) == 1 else f"{len(shards)} files"
        if conversion.prepare is not None:
            (out / PREPARED).mkdir(exist_ok=True)
            conversion.prepare(out / PREPARED, print_line)
        print_line(f"{out}: {len(conversion.tensors)} tensors, {readable(conversion.total_bytes)}, {files}")
        for file, names in shards.items():
            size = sum(map(conversion.bytes_of, names))
            with _progress_bar(file, 2 * size) as advance:
                complete = _is_complete(conversion, out / file, names, advance)
                if not complete:
                    _write_shard(conversion, out / file, names, advance)
            print_line(f"  {file}  {readable(size)} {'kept' if complete else 'written'} and verified")
        if len(shards) > 1:
            weight_map = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": conversion.total_bytes}, "weight_map": weight_map}
            _write_file(out / "model.safetensors.index.json", _json(index))
        for file, content in sorted(conversion.files.items(), key=lambda item: item[0] == "config.json"):
            (out / file).parent.mkdir(exist_ok=True)
            _write_file(out / file, content)
        Checkpoint.open(out, PersimmonConfig.from_folder(out))
        shutil.rmtree(out / PREPARED, ignore_errors=True)
        (out / MARKER).unlink()
        _sync(out)
    except OSError as error:
        raise CheckpointError(f"{error.filename or out} cannot be written: {error.strerror or error}") from error


def _claim(conversion: Conversion, out: Path, shards: Mapping[str, list[str]]) -> None:
    """Makes the folder, or finds it left by the same conversion; the disk has to have room for what is missing."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; expected the folder to write to")
    marker = out / MARKER
    present = {path.name for path in out.iterdir()} if out.exists() else set()
    if MARKER in present:
        if marker.read_bytes() != _json(conversion.origin):
            raise CheckpointError(
                f"{out} holds an unfinished conversion of another source, or with other settings (see {MARKER}): "
                f"finish that one, or delete the folder"
            )
    elif present - {f"{MARKER}.partial"}:
        raise CheckpointError(f"{out} is not empty and does not hold an unfinished conversion: give a new folder")
    missing = [file for file in shards if file not in present]
    needed = sum(conversion.bytes_of(name) for file in missing for name in shards[file])
    needed += sum(map(len, conversion.files.values())) + conversion.prepared_bytes
    free = shutil.disk_usage(next(folder for folder in (out, *out.absolute().parents) if folder.exists())).free
    free += sum(path.stat().st_size for path in (*out.glob("*.partial"), *out.glob(f"{PREPARED}/*")))
    if needed > free:
        raise CheckpointError(
            f"{out}: the conversion needs {readable(needed)}, but its disk has only {readable(free)} free"
        )
    out.mkdir(parents=True, exist_ok=True)
    if MARKER not in present:
        _write_file(marker, _json(conversion.origin))


Advance = Callable[[int], None]


def _write_shard(conversion: Conversion, path: Path, names: list[str], advance: Advance) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + conversion.bytes_of(name)
        dtype = _SAFETENSORS_NAMES[conversion.dtype_of(name)]
        header[name] = {"dtype": dtype, "shape": conversion.tensors[name].shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # aligns the tensors in the file
    with _partial(path) as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            for _, rows in _converted(conversion, name):
                file.write(_bytes(rows))
                advance(rows.nbytes)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # what is compared then comes from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        different = _difference(conversion, Path(file.name), names, advance)
        if different is not None:
            raise CheckpointError(
                f"{path}: tensor {different} read back differs from what was written; the disk or memory may be "
                f"faulty, or the source may have changed meanwhile"
            )


def _is_complete(conversion: Conversion, path: Path, names: list[str], advance: Advance) -> bool:
    """Whether a shard of an earlier run is there and holds what it should."""
    if not path.exists():
        return False
    compared = 0

    def count(size: int) -> None:
        nonlocal compared
        compared += size
        advance(2 * size)

    if _difference(conversion, path, names, count) is None:
        return True
    advance(-2 * compared)
    return False


def _difference(conversion: Conversion, path: Path, names: list[str], advance: Advance) -> str | None:
    """The first tensor of a file whose bits are not those of its source; None where all are the same."""
    try:
        written = read_safetensors_file(path)
    except CheckpointError:
        return names[0]
    for name in written.keys() ^ set(names):
        return name
    for name in names:
        if (written[name].dtype, written[name].shape) != (conversion.dtype_of(name), conversion.tensors[name].shape):
            return name
        for start, rows in _converted(conversion, name):
            read_back = written[name].rows(start, start + len(rows))
            if not torch.equal(read_back.view(torch.uint8), rows.view(torch.uint8)):
                return name
            advance(rows.nbytes)
    return None


def _converted(conversion: Conversion, name: str) -> Iterator[tuple[int, torch.Tensor]]:
    """A tensor in its new type, some rows at a time, each with the number of the first row."""
    source, dtype = conversion.tensors[name], conversion.dtype_of(name)
    row_bytes = math.prod(source.shape[1:]) * source.dtype.itemsize
    step = max(1, CHUNK_BYTES // row_bytes)
    narrower = dtype != source.dtype and torch.finfo(dtype).max < torch.finfo(source.dtype).max
    for start in range(0, source.shape[0], step):
        stored = source.rows(start, min(start + step, source.shape[0]))
        rows = stored.to(dtype)
        if narrower and bool((rows.isinf() & stored.isfinite()).any()):
            largest = stored[stored.isfinite()].abs().max().item()
            type_name = str(dtype).removeprefix("torch.")
            raise CheckpointError(
                f"tensor {name} has the value {largest:.6g}, more than {type_name} can hold "
                f"({torch.finfo(dtype).max:.6g}): convert to another type"
            )
        yield start, rows


@contextlib.contextmanager
def _partial(path: Path) -> Iterator[BinaryIO]:
    """A file under another name, which gets its own once all went well."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        yield file
    partial.replace(path)
    _sync(path.parent)


def _write_file(path: Path, content: bytes) -> None:
    with _partial(path) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bytes(rows: torch.Tensor) -> memoryview:
    return rows.view(torch.uint8).numpy().data


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"


@contextlib.contextmanager
def _progress_bar(name: str, total: int) -> Iterator[Advance]:
    """Bytes written and bytes compared."""
    with progress_bar(name, total, "B") as bar:

        def advance(size: int) -> None:
            bar.update(size)

        yield advance
