"""A safetensors file -> its tensors, which are read from the file row by row when asked.

The safetensors library checks the file's header.  The numbers are read without it, since a mapping of the file would
stay in memory as far as it was read.
"""

import json
import math
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from persimmon.model.errors import CheckpointError
from persimmon.model.stored import LFS_POINTER, Region, Storage, StoredTensor, damaged, lfs_pointer

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""The types that tensors may have, by the names of the format."""


def read_safetensors_file(path: Path, allowed: Collection[torch.dtype] = ()) -> dict[str, StoredTensor]:
    """The tensors of a file that have one of DTYPES, in file order; others are left out.

    Args:
        path: the file.
        allowed: types that all tensors have to be of; none to leave out what is not of DTYPES.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or has a tensor of a type that is not allowed.
    """
    region = Region.of_file(path)
    with region.opened() as file:
        if file.read(64).startswith(LFS_POINTER):
            raise lfs_pointer(region)
        try:
            with safe_open(path, framework="pt", device="cpu"):
                pass
        except SafetensorError as error:
            raise damaged(region, str(error)) from error
        except RuntimeError as error:  # PyTorch could not map it
            raise CheckpointError(f"{path} is too large to be mapped into memory: {error}") from error
        file.seek(0)
        (size,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype = DTYPES.get(entry["dtype"])
        if allowed and dtype not in allowed:
            names = ", ".join(name for name, own in DTYPES.items() if own in allowed)
            raise CheckpointError(f"{path}: tensor {name} is {entry['dtype']}; expected one of {names}")
        if dtype is not None:
            shape = tuple(entry["shape"])
            storage = Storage(dtype, math.prod(shape), 8 + size + entry["data_offsets"][0])
            tensors[name] = StoredTensor.contiguous(region, shape, storage)
    return tensors
