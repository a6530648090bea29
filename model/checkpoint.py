"""A folder in Hugging Face layout -> named tensors, one at a time, once all that headers can tell is checked.

Knows the names and shapes of a Persimmon network's tensors and the file formats they come in.  Knows nothing
of where they go: the network's own layout, device and type are its caller's.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from model.config import PersimmonConfig
from model.errors import CheckpointError
from model.json_object import JsonObject

# In the order Transformers looks for them: a folder may hold several formats of the same weights.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def expected_shapes(config: PersimmonConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a Persimmon checkpoint by their Hugging Face names, in the order of the network.

    Linear weights are [out, in].  The rows of query_key_value are ordered [head, {query, key, value},
    head_dim]: per head, so that a plain split into three has valid shapes and wrong contents.  With
    tie_word_embeddings there is no lm_head.weight, nor in a classifier, which has its score instead.
    """
    hidden, intermediate = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def linear(name: str, width_out: int, width_in: int) -> None:
        shapes[f"{name}.weight"] = (width_out, width_in)
        shapes[f"{name}.bias"] = (width_out,)

    for layer in (f"model.layers.{number}" for number in range(config.num_hidden_layers)):
        norm(f"{layer}.input_layernorm", hidden)
        linear(f"{layer}.self_attn.query_key_value", 3 * hidden, hidden)
        if config.qk_layernorm:
            norm(f"{layer}.self_attn.q_layernorm", config.head_dim)
            norm(f"{layer}.self_attn.k_layernorm", config.head_dim)
        linear(f"{layer}.self_attn.dense", hidden, hidden)
        norm(f"{layer}.post_attention_layernorm", hidden)
        linear(f"{layer}.mlp.dense_h_to_4h", intermediate, hidden)
        linear(f"{layer}.mlp.dense_4h_to_h", hidden, intermediate)
    norm("model.final_layernorm", hidden)
    if not config.generates:
        shapes["score.weight"] = (config.num_labels, hidden)
        if config.score_bias:
            shapes["score.bias"] = (config.num_labels,)
    elif not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def dummy_tensors(
    config: PersimmonConfig, dtype: torch.dtype, device: torch.device | str, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Random tensors in place of a checkpoint's, to measure speed: same names, shapes and order.

    Weights and biases are drawn from N(0, 0.02²) as at the start of training, norm weights from N(1, 0.1²),
    so that nothing overflows or vanishes.  They are made on the device, one at a time.

    Args:
        config: the network.
        dtype: of the tensors; a floating point type.
        device: where they are made.
        seed: the same seed makes the same tensors on the same kind of device.
    """
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in expected_shapes(config).items():
        mean, deviation = (1.0, 0.1) if name.endswith("layernorm.weight") else (0.0, 0.02)
        yield (
            name,
            torch.empty(shape, dtype=dtype, device=device).normal_(mean, deviation, generator=generator),
        )


@dataclass(frozen=True)
class Checkpoint:
    """The weight files of a checkpoint that holds exactly the tensors its network needs.

    Attributes:
        files: the weight files, in the order they are read.
        names: the tensors that are read.
        total_bytes: their size, in the types they are stored in.
        dtype: the widest of those types.
    """

    files: "tuple[_WeightFile, ...]"
    names: frozenset[str]
    total_bytes: int
    dtype: torch.dtype

    @classmethod
    def open(cls, folder: Path, config: PersimmonConfig) -> "Checkpoint":
        """Finds a folder's weight files and compares their headers with the network; reads no tensor yet.

        Safetensors are preferred to pickled files, and a single file to shards with an index, as in
        Transformers.

        Args:
            folder: a checkpoint in Hugging Face layout.
            config: its network.

        Raises:
            CheckpointError: a file is missing, truncated, damaged or holds more than tensors; a tensor is
                missing, unexpected, in two shards, of another shape or not floating point.
        """
        listing, files, index = _find_files(folder)
        found: dict[str, tuple[Path, _Header]] = {}
        for file in files:
            headers = file.headers()
            for name, header in headers.items():
                if _is_buffer(name):
                    continue
                if name in found:
                    raise CheckpointError(f"{file.path}: tensor {name} is also in {found[name][0].name}")
                found[name] = (file.path, header)
            absent = [name for name, shard in index.items() if shard == file.path.name and name not in headers]
            if absent:
                raise CheckpointError(
                    f"{file.path}: tensor {absent[0]} is missing here, where {listing.name} says it is"
                    f"{_and_more(absent)}"
                )
        _compare(listing, found, config)
        total_bytes = sum(header.bytes for _, header in found.values())
        widest = max((header.dtype for _, header in found.values()), key=_BYTES.__getitem__)
        return cls(files, frozenset(found), total_bytes, getattr(torch, widest))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor once, by name, in the order they lie in the files.

        Each is on the CPU, in its stored type, and reads its pages from the file when it is used.  The reader
        copies it to where it belongs and drops it; only then the next one is made.  (A pickled file stays
        mapped until it is read through; one from before PyTorch 1.6 cannot be mapped and is read as a whole.)

        Raises:
            CheckpointError: a file has become unreadable since `open`.
        """
        for file in self.files:
            yield from file.tensors(self.names)


@dataclass(frozen=True)
class _Header:
    """What a file says about a tensor before it is read; dtype is PyTorch's name of it, like "bfloat16"."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _BYTES[self.dtype]


class _WeightFile(Protocol):
    @property
    def path(self) -> Path: ...

    def headers(self) -> dict[str, _Header]:
        """The tensors of the file, in file order."""

    def tensors(self, names: frozenset[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Those of the file's tensors that are among the names, in file order."""


@dataclass(frozen=True)
class _SafetensorsFile:
    path: Path

    def headers(self) -> dict[str, _Header]:
        with self._opened() as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            return {
                name: _Header(tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype()))
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

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        _check_readable(self.path)
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise _damaged(self.path, error) from error


@dataclass(frozen=True)
class _PickledFile:
    path: Path

    def headers(self) -> dict[str, _Header]:
        return {
            name: _Header(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._load().items()
        }

    def tensors(self, names: frozenset[str]) -> Iterator[tuple[str, torch.Tensor]]:
        loaded = self._load()
        for name in [name for name in loaded if name in names]:
            yield name, loaded.pop(name).detach()

    def _load(self) -> dict[str, torch.Tensor]:
        _check_readable(self.path)
        with self.path.open("rb") as file:
            is_zip = file.read(2) == b"PK"  # what torch.save has written since PyTorch 1.6
        try:
            loaded = torch.load(self.path, map_location="cpu", mmap=is_zip, weights_only=True)
        except Exception as error:  # unpickling damaged bytes raises nearly anything
            if isinstance(error, UnpicklingError):
                raise CheckpointError(
                    f"{self.path} is refused: it holds something other than plain tensors, and reading that "
                    "can run code; needed are tensors by name, best as safetensors"
                ) from error
            raise _damaged(self.path, error) from error
        if not isinstance(loaded, dict):
            raise CheckpointError(f"{self.path} holds a {type(loaded).__name__}, needed are tensors by name")
        for name, tensor in loaded.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise CheckpointError(
                    f"{self.path} holds a {type(tensor).__name__} under {name!r}, needed are tensors by name"
                )
        return loaded


def _find_files(folder: Path) -> tuple[Path, tuple[_WeightFile, ...], dict[str, str]]:
    """The file that lists a checkpoint's tensors (an index, or the one weight file), the files, the index."""
    listing = next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if listing is None:
        raise CheckpointError(f"{folder}: no weights; needed is one of {', '.join(_WEIGHT_FILES)}")
    if listing.suffix != ".json":
        return listing, (_weight_file(listing),), {}
    index = _read_index(listing)
    shards = [folder / name for name in sorted(set(index.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(f"{folder / missing[0]} is missing, {listing.name} names it{_and_more(missing)}")
    return listing, tuple(map(_weight_file, shards)), index


def _weight_file(path: Path) -> _WeightFile:
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _PickledFile(path)


def _read_index(path: Path) -> dict[str, str]:
    """An index's weight_map: tensor name -> name of the shard, a file beside the index."""
    index = JsonObject.read(path)
    if index is None:
        raise CheckpointError(f"{path} is missing")
    shards = index.table("weight_map")
    # A name with a folder in it would lead out of the checkpoint.
    if shards is None or not all(isinstance(name, str) and Path(name).name == name for name in shards.values.values()):
        raise index.error("weight_map", "each tensor's name with the name of its shard, a file beside the index")
    return shards.values


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb") as file:
            beginning = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if beginning.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` where it was cloned")


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    size = path.stat().st_size
    return CheckpointError(f"{path} is truncated or damaged ({size:,} bytes; {reason}): copy or download it again")


def _compare(listing: Path, found: Mapping[str, tuple[Path, _Header]], config: PersimmonConfig) -> None:
    """Raises CheckpointError unless exactly the network's tensors were found, of their shapes, in floats."""
    expected = expected_shapes(config)
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(f"{listing}: tensor {missing[0]} is missing{_and_more(missing)}")
    unexpected = [name for name in found if name not in expected]
    if unexpected:
        name = unexpected[0]
        says = "tie_word_embeddings" if config.generates else config.architecture
        hint = f", for config.json says {says}" if name == "lm_head.weight" else ""
        raise CheckpointError(f"{found[name][0]}: tensor {name} is unexpected{hint}{_and_more(unexpected)}")
    for name, (path, header) in found.items():
        if header.shape != expected[name]:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(header.shape)}, config.json needs {list(expected[name])}"
            )
        if header.dtype not in _BYTES:
            raise CheckpointError(f"{path}: tensor {name} is {header.dtype}, needed is one of {', '.join(_BYTES)}")


def _is_buffer(name: str) -> bool:
    """Whether a tensor is one that old versions of Transformers stored though it follows from config.json."""
    return name.endswith(".rotary_emb.inv_freq")


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
