"""A folder that optimum-intel exported for OpenVINO -> what its conversion to Hugging Face layout needs.

Knows which files such a folder has.  The openvino package reads the graph, and maps its weights' file: it takes no more
memory than pages of it that were just read.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from persimmon.model.config import PersimmonConfig
from persimmon.model.convert.check import check_tensors
from persimmon.model.convert.hugging_face import config_json, other_files, same_head
from persimmon.model.convert.openvino_graph import GraphReader
from persimmon.model.convert.openvino_weights import Weight
from persimmon.model.convert.writer import Conversion
from persimmon.model.errors import CheckpointError
from persimmon.model.json_object import JsonObject
from persimmon.model.leftovers import settle
from persimmon.model.sentencepiece_backend import MODEL_FILES
from persimmon.model.stored import LFS_POINTER, Region, lfs_pointer, small_file
from persimmon.model.tokenizer_json import TOKENIZER_JSON

_GRAPH, _NUMBERS = "openvino_model.xml", "openvino_model.bin"


def openvino_package() -> Any:
    """The openvino package.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        import openvino
    except ImportError:
        raise CheckpointError(
            "--from-openvino needs the openvino package: install it with pip install 'persimmon-server[openvino]'"
        ) from None
    return openvino


def plan_from_openvino(folder: Path, dtype: torch.dtype | None, max_shard_bytes: int) -> Conversion:
    """The conversion of an export, once its whole graph is checked.

    config.json is the folder's own, with the new type in it, and the tokenizer's files are copied.

    Args:
        folder: openvino_model.xml and .bin, config.json, and the tokenizer's files.
        dtype: to store tensors in; None for float16, or the type of all matrices where that is bfloat16 or float32.
        max_shard_bytes: see `Conversion`.

    Raises:
        CheckpointError: the openvino package or a file is missing, or the graph is not that of a Persimmon network that
            config.json describes.
    """
    openvino = openvino_package()
    config = PersimmonConfig.from_folder(folder)
    parts = [Region.of_file(folder / name) for name in (_GRAPH, _NUMBERS)]
    for part in parts:
        with part.opened() as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise lfs_pointer(part)
    try:
        model = openvino.Core().read_model(str(folder / _GRAPH), str(folder / _NUMBERS))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-200:]
        raise CheckpointError(
            f"{folder / _GRAPH} cannot be read by OpenVINO {openvino.__version__}: {reason}"
        ) from None
    weights = GraphReader(model, config, folder / _GRAPH).weights()
    settled = settle(weights, config, lambda: same_head(weights))
    kept = {name: weights[stored] for stored, name in settled.names.items()}
    ordered = check_tensors(kept, settled.config, folder / _GRAPH, dict.fromkeys(kept, folder / _GRAPH))
    dtype = dtype or _common_dtype(kept)
    files = {path.relative_to(folder).as_posix(): small_file(Region.of_file(path)) for path in other_files(folder)}
    files["config.json"] = config_json(folder, settled.config, {dtype})
    return Conversion(
        origin={
            "source": str(folder.resolve()),
            "files": [[part.path.name, part.length, part.path.stat().st_mtime_ns] for part in parts],
            "dtype": str(dtype),
            "max_shard_bytes": max_shard_bytes,
        },
        config=settled.config,
        tensors=ordered,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        files=files,
        notes=(*settled.notes, *_notes(folder, files)),
    )


def _common_dtype(weights: Mapping[str, Weight]) -> torch.dtype:
    """What to store tensors in: the matrices' type, where it is bfloat16 or float32 and none is compressed."""
    matrices = [weight for weight in weights.values() if len(weight.shape) == 2]
    dtypes = {weight.dtype for weight in matrices}
    compressed = any(weight.compressed for weight in matrices)
    return torch.float16 if compressed or len(dtypes) != 1 else dtypes.pop()


def _notes(folder: Path, files: Mapping[str, bytes]) -> Iterator[str]:
    if TOKENIZER_JSON in files and not any(name in files for name in MODEL_FILES):
        values = JsonObject.parse(folder / TOKENIZER_JSON, files[TOKENIZER_JSON]).values
        kind = model.get("type") if isinstance(model := values.get("model"), dict) else None
        if kind != "Unigram":
            yield (
                f"its tokenizer.json is of the kind {kind}, and Persimmon's is Unigram: ids may be others than in "
                f"training.  Put the original tokenizer.model into the folder"
            )
