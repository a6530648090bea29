"""A GGUF file of Persimmon -> what its conversion to Hugging Face layout needs.

Knows llama.cpp's names of tensors and metadata, and how its network reads them.

How they are known: llama.cpp had Persimmon from October 2023 (ggerganov/llama.cpp).  Two scripts wrote such files:
convert-persimmon-to-gguf.py from Adept's release, and PersimmonModel in convert-hf-to-gguf.py from Hugging Face's
layout.  Both rename tensors (gguf-py/gguf/tensor_mapping.py) and change no number.  So the rows of attn_qkv stay in the
order [head, {q, k, v}, dimension], in which build_persimmon in llama.cpp splits them (to n_embd_head x 3 x n_head), and
unlike Llama's they are not permuted.  It turns the first half of each head's dimensions in NeoX's way, in pairs a half
apart, which is Transformers' way too.  Until pull request 4889 of January 2024 it did so whatever rope.dimension_count
said (a copy is in SJTU-IPADS/PowerInfer), where the scripts wrote the whole head; since then they write half of it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from persimmon.model.config import PersimmonConfig
from persimmon.model.convert.check import check_tensors
from persimmon.model.convert.gguf_file import GGUFFile, QuantizedBlocks
from persimmon.model.convert.gguf_tokenizer import tokenizer_model
from persimmon.model.convert.new_config import MAX_POSITION_EMBEDDINGS, NewConfig
from persimmon.model.convert.sources import TensorSource
from persimmon.model.convert.writer import Conversion
from persimmon.model.errors import CheckpointError
from persimmon.model.sentencepiece_backend import MODEL_FILES, parse_model
from persimmon.model.stored import Region, small_file
from persimmon.model.tokenizer_settings import END_OF_TEXT

_ARCHITECTURE = "persimmon"

_NETWORK = {"token_embd": "model.embed_tokens", "output_norm": "model.final_layernorm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.query_key_value",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "attn_output": "self_attn.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}


def plan_from_gguf(source: Path, dtype: torch.dtype | None, max_shard_bytes: int) -> Conversion:
    """The conversion of a GGUF file, once all that its header can tell is checked.

    config.json is made of the metadata and the tensors' shapes.  tokenizer.model is the one next to the file where
    there is one, which has to have the same pieces; otherwise it is made of the vocabulary in the file.

    Args:
        source: the file.
        dtype: to store tensors in; None for float16, or the type of all matrices where that is bfloat16 or float32.
        max_shard_bytes: see `Conversion`.

    Raises:
        CheckpointError: the gguf package is missing, the file is damaged, or the network is not Persimmon's.
    """
    file = GGUFFile.read(source)
    place = file.region
    if (architecture := file.metadata.get("general.architecture")) != _ARCHITECTURE:
        raise CheckpointError(f"{place}: its architecture is {architecture!r}; expected {_ARCHITECTURE!r}")
    if isinstance(parts := file.metadata.get("split.count"), int) and parts > 1:
        raise CheckpointError(f"{place} is one of {parts} parts: join them with llama.cpp's llama-gguf-split --merge")
    tensors = {_hugging_face_name(name): tensor for name, tensor in file.tensors.items()}
    model = tokenizer_model(file.metadata, place) if (own := _original(source)) is None else _matching(own, file)
    pieces = [piece.piece for piece in model.pieces]
    settings = _Metadata(place, file.metadata)
    config = _config(settings, tensors, pieces)
    network = config.checked(place)
    ordered = check_tensors(tensors, network, place, dict.fromkeys(tensors, place))
    dtype = dtype or _common_dtype(ordered)
    files = config.files(str(dtype).removeprefix("torch."), _tokenizer_settings(settings, config, pieces))
    files["tokenizer.model"] = small_file(own) if own is not None else model.SerializeToString()
    if isinstance(template := file.metadata.get("tokenizer.chat_template"), str):
        files["chat_template.jinja"] = template.encode()
    origin = {
        "source": str(source.resolve()),
        "files": [[str(part), part.length, part.path.stat().st_mtime_ns] for part in (place, own) if part is not None],
        "dtype": str(dtype),
        "max_shard_bytes": max_shard_bytes,
    }
    return Conversion(
        origin=origin,
        config=network,
        tensors=ordered,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        files=files,
        notes=_notes(file, dtype, own),
    )


def _hugging_face_name(name: str) -> str:
    """Hugging Face's name of a tensor; one that is not known stays as it is."""
    match name.split("."):
        case ["blk", number, part, kind] if part in _LAYER and number.isdecimal():
            return f"model.layers.{int(number)}.{_LAYER[part]}.{kind}"
        case [part, kind] if part in _NETWORK:
            return f"{_NETWORK[part]}.{kind}"
    return name


def _original(source: Path) -> Region | None:
    """The SentencePiece model next to the file."""
    paths = (source.parent / name for name in MODEL_FILES)
    return next((Region.of_file(path) for path in paths if path.exists()), None)


def _matching(own: Region, file: GGUFFile) -> Any:
    """The model next to the file, if it has the file's pieces."""
    model = parse_model(small_file(own), own)
    texts = file.metadata.get("tokenizer.ggml.tokens")
    pieces = [piece.piece.encode() for piece in model.pieces]
    if isinstance(texts, list) and texts[: len(pieces)] != pieces:
        raise CheckpointError(f"{own} has other pieces than {file.region}: remove the one that does not belong to it")
    return model


class _Metadata:
    """The values of a file by their keys, checked when they are asked for."""

    def __init__(self, place: Region, values: Mapping[str, Any]) -> None:
        self.place = place
        self._values = values

    def number(self, key: str, default: float | None = None) -> Any:
        """A positive number of the network; an integer where the default is one or there is none."""
        value = self._values.get(f"{_ARCHITECTURE}.{key}", default)
        kinds = int | float if isinstance(default, float) else int
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < 1e9:
            raise self.error(f"{_ARCHITECTURE}.{key}", "expected a positive number")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A value of the tokenizer that is true or false."""
        value = self._values.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, bool):
            raise self.error(f"tokenizer.ggml.{key}", "expected true or false")
        return value

    def token_id(self, key: str, pieces: list[str]) -> int:
        """A token's id; that of END_OF_TEXT where the file does not say."""
        value = self._values.get(f"tokenizer.ggml.{key}")
        if value is None and END_OF_TEXT in pieces:
            return pieces.index(END_OF_TEXT)
        if type(value) is not int or not 0 <= value < len(pieces):
            raise self.error(f"tokenizer.ggml.{key}", f"expected one of the {len(pieces):,} pieces")
        return value

    def error(self, key: str, needed: str) -> CheckpointError:
        """What to raise for a value."""
        return CheckpointError(f"{self.place}: {key} is {str(self._values.get(key))[:80]}; {needed}")


def _config(settings: _Metadata, tensors: Mapping[str, TensorSource], pieces: list[str]) -> NewConfig:
    hidden_size, heads = settings.number("embedding_length"), settings.number("attention.head_count")
    if settings.number("attention.head_count_kv", heads) != heads:
        raise settings.error("persimmon.attention.head_count_kv", f"Persimmon has as many as heads of queries, {heads}")
    head_dim = hidden_size // heads
    rotary = settings.number("rope.dimension_count", head_dim // 2)
    if rotary not in (head_dim, head_dim // 2):
        raise settings.error(
            "persimmon.rope.dimension_count", f"expected {head_dim // 2}, half of a head, or {head_dim}"
        )
    embedding = tensors.get("model.embed_tokens.weight")
    vocab_size = embedding.shape[0] if embedding is not None else len(pieces)
    if len(pieces) > vocab_size:
        raise CheckpointError(
            f"{settings.place} has {len(pieces):,} pieces, but the embedding has only {vocab_size:,} rows"
        )
    return NewConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=settings.number("feed_forward_length"),
        num_hidden_layers=settings.number("block_count"),
        num_attention_heads=heads,
        max_position_embeddings=settings.number("context_length", MAX_POSITION_EMBEDDINGS),
        layer_norm_eps=_short(settings.number("attention.layer_norm_epsilon", PersimmonConfig.layer_norm_eps)),
        rope_theta=_short(settings.number("rope.freq_base", PersimmonConfig.rope_theta)),
        partial_rotary_factor=PersimmonConfig.partial_rotary_factor,
        qk_layernorm="model.layers.0.self_attn.q_layernorm.weight" in tensors,
        tie_word_embeddings="lm_head.weight" not in tensors,
        bos_token_id=settings.token_id("bos_token_id", pieces),
        eos_token_id=settings.token_id("eos_token_id", pieces),
    )


def _short(value: float) -> float:
    """A number that was stored in 32 bits, in the fewest digits that mean it: 1e-05, not 9.999999747378752e-06."""
    return float(f"{value:.7g}")


def _tokenizer_settings(settings: _Metadata, config: NewConfig, pieces: list[str]) -> dict[str, Any]:
    """As in the public checkpoints, unless the file says otherwise."""
    return {
        "add_bos_token": settings.flag("add_bos_token", True),
        "add_eos_token": settings.flag("add_eos_token", False),
        "bos_token": pieces[config.bos_token_id],
        "eos_token": None,
        "unk_token": "<unk>",
    }


def _common_dtype(tensors: Mapping[str, TensorSource]) -> torch.dtype:
    """What to store tensors in: the matrices' type, where it is bfloat16 or float32 and none is quantized."""
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) == 2]
    quantized = any(isinstance(tensor, QuantizedBlocks) for tensor in matrices)
    dtypes = {tensor.dtype for tensor in matrices}
    return torch.float16 if quantized or len(dtypes) != 1 else dtypes.pop()


def _notes(file: GGUFFile, dtype: torch.dtype, own: Region | None) -> tuple[str, ...]:
    counts = {kind: [*file.types.values()].count(kind) for kind in dict.fromkeys(file.types.values())}
    listed = ", ".join(f"{count} in {kind}" for kind, count in counts.items())
    notes = [f"tensors: {listed}; those that are not quantized are written in {str(dtype).removeprefix('torch.')}"]
    if own is None:
        notes.append(
            "the tokenizer is made of the file's vocabulary, which does not say how text is normalized: it is taken as "
            "it is, with a space before it.  An original tokenizer.model next to the file is used in its place"
        )
    else:
        notes.append(f"the tokenizer is {own}, which has the file's pieces")
    return tuple(notes)
