"""Megatron's files of one network, one for each tensor-parallel rank -> its tensors by their Hugging Face names.

Knows names and splits, and nothing of folders or of Hugging Face's files.

How they are known: Adept published the code that loads its release (github.com/persimmon-ai-labs/adept-inference).
megatron/model/{gpt_model,language_model,transformer}.py there nest and name the tensors, and megatron/mpu/layers.py
splits them.  The rename is the one that Transformers' own conversion script for Persimmon makes
(convert_persimmon_weights_to_hf.py): query_key_value keeps its order, per head.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from persimmon.model.convert.sources import JoinedTensor, TensorSource
from persimmon.model.errors import CheckpointError
from persimmon.model.pickle_reader import Record
from persimmon.model.stored import Region, StoredTensor
from persimmon.model.torch_file import read_torch_file

# By the last parts of a tensor's name.  A linear layer whose output is split has its bias split too; one whose
# input is split adds its bias once, so each rank has all of it, as of the norms.
_SPLIT_ROWS = (
    *("embed_tokens.weight", "lm_head.weight", "query_key_value.weight", "query_key_value.bias"),
    *("dense_h_to_4h.weight", "dense_h_to_4h.bias"),
)
_SPLIT_COLUMNS = ("self_attn.dense.weight", "dense_4h_to_h.weight")

_PREFIXES = {
    "language_model.embedding.word_embeddings.": "model.embed_tokens.",
    "language_model.encoder.": "model.",
    "language_model.transformer.": "model.",  # the encoder's older name
    "word_embeddings_for_head.": "lm_head.",
}

_MAX_KEYS = 100_000


@dataclass(frozen=True)
class Rank:
    """One tensor-parallel rank's file.

    Attributes:
        region: where it is.
        tensors: by their Hugging Face names.
        settings: Megatron's arguments; empty where the file has none.
        rotary_dim: as the stored frequencies say; None where there are none.
    """

    region: Region
    tensors: Mapping[str, StoredTensor]
    settings: Mapping[str, Any]
    rotary_dim: int | None

    @classmethod
    def read(cls, region: Region) -> "Rank":
        """Reads what a rank's file says, but no tensor.

        Raises:
            CheckpointError: the file is damaged or not Megatron's.
        """
        contents = read_torch_file(region)
        model = contents.get("model") if isinstance(contents, dict) else None
        if not isinstance(model, dict):
            raise CheckpointError(f"{region}: no tensors under the key 'model', where Megatron's checkpoints have them")
        tensors: dict[str, StoredTensor] = {}
        rotary_dim = None
        for key, value in _flattened(region, model):
            if not isinstance(value, StoredTensor):
                raise CheckpointError(f"{region}: {key} is a {type(value).__name__}; expected a tensor")
            if key.endswith("rotary_emb.inv_freq"):
                rotary_dim = 2 * value.shape[0] if value.shape else None
                continue
            name = _hugging_face_name(key)
            if name in tensors:
                raise CheckpointError(f"{region} contains {key} twice")
            tensors[name] = value
        arguments = contents.get("args")
        settings = arguments.attributes if isinstance(arguments, Record) else arguments
        return cls(
            region=region,
            tensors=tensors,
            settings=settings if isinstance(settings, dict) else {},
            rotary_dim=rotary_dim,
        )


def merge(ranks: Sequence[Rank]) -> dict[str, TensorSource]:
    """The tensors of all ranks together.

    Args:
        ranks: all of them, in order.

    Raises:
        CheckpointError: one is missing, or they are not of the same network.
    """
    _check_same_network(ranks)
    return {name: _merged(name, ranks) for name in ranks[0].tensors}


def _flattened(region: Region, model: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, by their keys joined with dots."""
    pending: list[tuple[str, Any]] = [("", model)]
    for _ in range(_MAX_KEYS):
        if not pending:
            return
        key, value = pending.pop()
        if isinstance(value, dict):
            prefix = f"{key}." if key else ""
            pending.extend((f"{prefix}{name}", value[name]) for name in reversed(value))
        else:
            yield key, value
    raise CheckpointError(f"{region}: more than {_MAX_KEYS:,} keys under 'model'")


def _hugging_face_name(key: str) -> str:
    """Megatron's name of a tensor -> Hugging Face's; one that is not known stays as it is."""
    for megatron, name in _PREFIXES.items():
        if key.startswith(megatron):
            return re.sub(r"\.(self_)?attention\.", ".self_attn.", name + key.removeprefix(megatron))
    return key


def _check_same_network(ranks: Sequence[Rank]) -> None:
    first = ranks[0]
    size = first.settings.get("tensor_model_parallel_size")
    if isinstance(size, int) and size != len(ranks):
        raise CheckpointError(
            f"{first.region} is one of {size} tensor-parallel ranks, but {len(ranks)} were found: all are needed"
        )
    for rank in ranks[1:]:
        for name in (*first.tensors, *rank.tensors):
            ours, theirs = first.tensors.get(name), rank.tensors.get(name)
            if ours is None or theirs is None:
                raise CheckpointError(f"{rank.region}: {name} is missing either here or in the first rank")
            if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
                raise CheckpointError(
                    f"{rank.region}: {name} is {list(theirs.shape)} {theirs.dtype}, but {list(ours.shape)} "
                    f"{ours.dtype} in the first rank"
                )


def _merged(name: str, ranks: Sequence[Rank]) -> TensorSource:
    """A tensor of all ranks together.

    Raises:
        CheckpointError: it is one that each rank has as a whole, and they are not equal.
    """
    parts = [rank.tensors[name] for rank in ranks]
    dimensions = len(parts[0].shape)
    if len(parts) == 1:
        return parts[0]
    if name.endswith(_SPLIT_ROWS) and dimensions:
        return JoinedTensor(tuple(parts), dim=0)
    if name.endswith(_SPLIT_COLUMNS) and dimensions == 2:
        return JoinedTensor(tuple(parts), dim=1)
    if dimensions != 1:  # a norm or a bias is not a matrix; the check of the other shapes covers it
        return parts[0]
    rows = parts[0].rows(0, parts[0].shape[0]).view(torch.uint8)
    for rank, part in zip(ranks[1:], parts[1:], strict=True):
        if not torch.equal(rows, part.rows(0, part.shape[0]).view(torch.uint8)):
            raise CheckpointError(
                f"{rank.region}: {name} differs from the first rank's, although ranks do not split this tensor"
            )
    return parts[0]
