"""A checkpoint in Hugging Face layout, pickled or safetensors -> what its conversion to safetensors needs.

Knows which files such a folder has.  Reads no tensor, and writes nothing.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from persimmon.model.chat_template_files import TEMPLATE_FOLDER
from persimmon.model.checkpoint import equal_rows
from persimmon.model.config import PersimmonConfig
from persimmon.model.convert.check import FLOATS, check_tensors
from persimmon.model.convert.sources import TensorSource
from persimmon.model.convert.writer import Conversion
from persimmon.model.errors import CheckpointError
from persimmon.model.json_object import JsonObject
from persimmon.model.leftovers import EMBEDDING, HEAD, settle
from persimmon.model.regular_file import check_regular
from persimmon.model.safetensors_file import read_safetensors_file
from persimmon.model.stored import Region, small_file
from persimmon.model.tensor_names import network_name
from persimmon.model.torch_file import named_tensors
from persimmon.model.vocabulary import VOCABULARY_FILE, VocabularyMap
from persimmon.model.weight_files import find_weight_files

_COMPARED_ROWS = 4096

# What travels with the weights.  Training states and other formats' weights do not.
_OTHER_FILES = (
    *("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "adept_vocab.*"),
    *("chat_template*", f"{TEMPLATE_FOLDER}/*.jinja", "LICENSE*", "NOTICE*", "README*", VOCABULARY_FILE),
    *("preprocessor_config.json", "processor_config.json"),
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
    if config.quantization is not None:
        raise CheckpointError(
            f"{folder}: its weights are quantized already (quantization_config in config.json); convert takes "
            f"checkpoints of 16 or 32 bits: convert or trim the original one, then quantize it"
        )
    VocabularyMap.from_folder(folder, config)  # a wrong one is found before anything is written
    paths = [file.path for file in find_weight_files(folder)[1]]
    tensors: dict[str, TensorSource] = {}
    places: dict[str, Path] = {}
    for path in paths:
        for stored, tensor in _read(path).items():
            name = network_name(stored, config)
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {stored} is also in {places[name].name}")
            tensors[name], places[name] = tensor, path
    settled = settle(tensors, config, lambda: same_head(tensors))
    config = settled.config
    kept = {name: tensors[stored] for stored, name in settled.names.items()}
    ordered = check_tensors(kept, config, folder, {name: places[stored] for stored, name in settled.names.items()})
    files = {path.relative_to(folder).as_posix(): small_file(Region.of_file(path)) for path in other_files(folder)}
    files["config.json"] = config_json(folder, config, {dtype or tensor.dtype for tensor in ordered.values()})
    origin = {
        "source": str(folder.resolve()),
        "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths],
        "dtype": str(dtype),
        "max_shard_bytes": max_shard_bytes,
    }
    return Conversion(
        origin=origin,
        config=config,
        tensors=ordered,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        files=files,
        notes=settled.notes,
    )


def _read(path: Path) -> dict[str, TensorSource]:
    if path.suffix == ".safetensors":
        return dict(read_safetensors_file(path, allowed=FLOATS))
    return dict(named_tensors(path))


def other_files(folder: Path) -> Iterator[Path]:
    """The files of a folder that travel with the weights, but for config.json."""
    for pattern in _OTHER_FILES:
        for path in sorted(folder.glob(pattern)):
            if not path.is_dir():
                check_regular(path)  # a FIFO or a link to nothing would be missing in the result
                yield path


def same_head(tensors: Mapping[str, TensorSource]) -> bool:
    """Whether lm_head.weight and the embedding hold the same numbers."""
    embedding, head = tensors[EMBEDDING], tensors[HEAD]
    if embedding.shape != head.shape:
        return False
    rows = range(0, head.shape[0], _COMPARED_ROWS)
    ends = [min(start + _COMPARED_ROWS, head.shape[0]) for start in rows]
    return all(
        equal_rows(head.rows(start, end), embedding.rows(start, end)) for start, end in zip(rows, ends, strict=True)
    )


def config_json(folder: Path, config: PersimmonConfig, dtypes: set[torch.dtype]) -> bytes:
    """The folder's config.json with what the tensors show: whether there is an lm_head, and their type if it is one.

    Versions differ in the name of the type's key.
    """
    file = JsonObject.read(folder / "config.json")
    values = {} if file is None else dict(file.values)
    if not config.tie_word_embeddings and values.get("tie_word_embeddings"):
        values["tie_word_embeddings"] = False
    if len(dtypes) == 1:
        key = "torch_dtype" if "torch_dtype" in values else "dtype"
        values[key] = str(dtypes.pop()).removeprefix("torch.")
    return json.dumps(values, indent=2).encode() + b"\n"
