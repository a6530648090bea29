"""A checkpoint in Hugging Face layout, pickled or safetensors -> what its conversion to safetensors needs.

Knows which files such a folder has.  Reads no tensor, and writes nothing.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from model.config import PersimmonConfig
from model.convert.check import check_tensors
from model.convert.sources import TensorSource, read_safetensors
from model.convert.stored import Region, StoredTensor, small_file
from model.convert.torch_file import read_torch_file
from model.convert.writer import Conversion
from model.errors import CheckpointError
from model.json_object import JsonObject
from model.vocabulary import VOCABULARY_FILE, VocabularyMap

# In the order Transformers looks for them: a folder may hold several formats of the same weights.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What travels with the weights.  Training states and other formats' weights do not.
_OTHER_FILES = (
    *("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "adept_vocab.*"),
    *("chat_template*", "LICENSE*", "NOTICE*", "README*", VOCABULARY_FILE),
)


def plan_from_hugging_face(folder: Path, dtype: torch.dtype | None, max_shard_bytes: int) -> Conversion:
    """The conversion of a checkpoint folder, once all that headers can tell is checked.

    config.json is the folder's own, with the new type in it.

    Args:
        folder: the checkpoint.
        dtype: to store tensors in; None keeps each one's.
        max_shard_bytes: see `Conversion`.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors are not those that config.json asks for.
    """
    config = PersimmonConfig.from_folder(folder)
    VocabularyMap.from_folder(folder, config)  # a wrong one is found before anything is written
    paths = _weight_files(folder)
    tensors: dict[str, TensorSource] = {}
    places: dict[str, Path] = {}
    for path in paths:
        for name, tensor in _read(path).items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {name} is also in {places[name].name}")
            tensors[name], places[name] = tensor, path
    ordered = check_tensors(tensors, config, folder, places)
    files = {path.name: small_file(Region.of_file(path)) for path in _other_files(folder)}
    files["config.json"] = _config_json(folder, {dtype or tensor.dtype for tensor in ordered.values()})
    origin = {
        "source": str(folder.resolve()),
        "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths],
        "dtype": str(dtype),
        "max_shard_bytes": max_shard_bytes,
    }
    return Conversion(origin, config, ordered, dtype, max_shard_bytes, files)


def _weight_files(folder: Path) -> list[Path]:
    listing = next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if listing is None:
        raise CheckpointError(f"{folder}: no weights; needed is one of {', '.join(_WEIGHT_FILES)}")
    if listing.suffix != ".json":
        return [listing]
    index = JsonObject.read(listing)
    shards = index.table("weight_map") if index is not None else None
    names: set[Any] = set(shards.values.values()) if shards is not None else set()
    # A name with a folder in it would lead out of the checkpoint.
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CheckpointError(f"{listing}: weight_map is wrong, needed is each tensor's name with a file beside it")
    missing = [name for name in sorted(names) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder / missing[0]} is missing, {listing.name} names it")
    return [folder / name for name in sorted(names)]


def _read(path: Path) -> dict[str, TensorSource]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    contents = read_torch_file(Region.of_file(path))
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} holds a {type(contents).__name__}, needed are tensors by name")
    for name, tensor in contents.items():
        if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
            raise CheckpointError(
                f"{path} holds a {type(tensor).__name__} under {str(name)[:80]!r}, needed are tensors by name"
            )
    return contents


def _other_files(folder: Path) -> Iterator[Path]:
    for pattern in _OTHER_FILES:
        yield from (path for path in sorted(folder.glob(pattern)) if path.is_file())


def _config_json(folder: Path, dtypes: set[torch.dtype]) -> bytes:
    """The folder's config.json, with the tensors' type where they have one; versions differ in the key's name."""
    values = json.loads((folder / "config.json").read_text("utf-8"))
    if len(dtypes) == 1:
        key = "torch_dtype" if "torch_dtype" in values else "dtype"
        values[key] = str(dtypes.pop()).removeprefix("torch.")
    return json.dumps(values, indent=2).encode() + b"\n"
