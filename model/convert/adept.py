"""Adept's release of Persimmon, a tar or unpacked -> what its conversion to Hugging Face layout needs.

Knows which settings make which config.json.  Reads no more than headers and replicated norms, and writes nothing.

Megatron's settings have the names that Adept's code reads them by (github.com/persimmon-ai-labs/adept-inference,
megatron/checkpointing.py and megatron/model/transformer.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from persimmon.model.config import PersimmonConfig
from persimmon.model.convert.check import check_tensors
from persimmon.model.convert.megatron import Rank, merge
from persimmon.model.convert.new_config import MAX_POSITION_EMBEDDINGS, NewConfig
from persimmon.model.convert.release import Release
from persimmon.model.convert.sources import TensorSource
from persimmon.model.convert.writer import Conversion
from persimmon.model.errors import CheckpointError
from persimmon.model.sentencepiece_backend import parse_model
from persimmon.model.stored import Region, small_file
from persimmon.model.tokenizer_settings import END_OF_TEXT

# Settings that say which network it is, with the values that say Persimmon's.
_ONLY: dict[str, tuple[Any, ...]] = {
    "pos_emb": ("rotary",),
    "sq_relu": (True,),
    "apply_residual_connection_post_layernorm": (False,),
    "qk_layernorm": ("weights_per_layer", "weights_per_tensor_parallel_rank_and_layer", "none"),
}

# Those of the public checkpoints in Hugging Face layout.
_TOKENIZER_SETTINGS = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": END_OF_TEXT,
    "eos_token": None,
    "unk_token": "<unk>",
}


def plan_from_adept(source: Path, dtype: torch.dtype | None, max_shard_bytes: int) -> Conversion:
    """The conversion of Adept's release, once all that headers can tell is checked.

    config.json is made of the settings in the release and the tensors' shapes, the tokenizer's and the
    generation's settings are those of the public checkpoints in Hugging Face layout.

    Args:
        source: the release's tar, not compressed, or a folder that holds what was in it.
        dtype: to store tensors in; None keeps each one's.
        max_shard_bytes: see `Conversion`.

    Raises:
        CheckpointError: a file is missing or damaged, ranks do not fit together, or the network is not
            Persimmon's.
    """
    release = Release.find(source)
    ranks = [Rank.read(region) for region in release.ranks]
    first, tensors = ranks[0], merge(ranks)
    vocabulary = small_file(release.vocabulary)
    vocab_size, hidden_size = _shape(first, tensors, "model.embed_tokens.weight")
    pieces = _pieces(release.vocabulary, vocabulary, vocab_size)
    values = _config_values(first, tensors, (vocab_size, hidden_size), pieces.index(END_OF_TEXT))
    config = values.checked(first.region)
    ordered = check_tensors(tensors, config, first.region, dict.fromkeys(tensors, first.region))
    dtypes = {dtype or tensor.dtype for tensor in ordered.values()}
    stored = str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else None
    files = values.files(stored, _TOKENIZER_SETTINGS) | {"tokenizer.model": vocabulary}
    origin = {
        "source": str(source.resolve()),
        "files": [[str(part), part.length, part.path.stat().st_mtime_ns] for part in release.ranks],
        "dtype": str(dtype),
        "max_shard_bytes": max_shard_bytes,
    }
    return Conversion(
        origin=origin, config=config, tensors=ordered, dtype=dtype, max_shard_bytes=max_shard_bytes, files=files
    )


def _pieces(region: Region, vocabulary: bytes, vocab_size: int) -> list[str]:
    """The vocabulary's pieces, with END_OF_TEXT among them."""
    pieces = [piece.piece for piece in parse_model(vocabulary, region).pieces]
    if len(pieces) > vocab_size:
        raise CheckpointError(
            f"{region} has {len(pieces)} pieces, but the embedding has {vocab_size} rows: they do not belong to the "
            f"same model"
        )
    if END_OF_TEXT not in pieces:
        raise CheckpointError(f"{region} lacks {END_OF_TEXT!r}, which begins and ends Adept's texts")
    return pieces


def _config_values(
    rank: Rank, tensors: Mapping[str, TensorSource], table: tuple[int, int], end_of_text: int
) -> NewConfig:
    """What config.json will say, but for the type of the tensors.

    Args:
        rank: the first one.
        tensors: by their Hugging Face names.
        table: the shape of the embedding.
        end_of_text: the id of the piece that begins and ends texts.
    """
    for key, allowed in _ONLY.items():
        if rank.settings.get(key) not in (None, *allowed):
            raise _wrong_setting(rank, key, f"Persimmon's networks have {' or '.join(map(repr, allowed))}")
    vocab_size, hidden_size = table
    intermediate_size, _ = _shape(rank, tensors, "model.layers.0.mlp.dense_h_to_4h.weight")
    layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    qk_norm = "model.layers.0.self_attn.q_layernorm.weight"
    head_dim = tensors[qk_norm].shape[0] if qk_norm in tensors and tensors[qk_norm].shape else 0
    heads = hidden_size // head_dim if head_dim else _number(rank, "num_attention_heads", 0)
    if not heads or hidden_size % heads:
        raise CheckpointError(
            f"{rank.region}: the number of heads is unknown or wrong: hidden size {hidden_size}, norms of queries of "
            f"size {head_dim or 'unknown'}, num_attention_heads {rank.settings.get('num_attention_heads')}"
        )
    found = {
        "num_layers": len(layers),
        "hidden_size": hidden_size,
        "ffn_hidden_size": intermediate_size,
        "num_attention_heads": heads,
        "kv_channels": hidden_size // heads,
        "padded_vocab_size": vocab_size,
    }
    for key, value in found.items():
        if rank.settings.get(key) not in (None, value):
            raise _wrong_setting(rank, key, f"its tensors' shapes say {value}")
    rotary_dim = rank.rotary_dim or PersimmonConfig.partial_rotary_factor * (hidden_size // heads)
    factor = _number(rank, "rotary_pct", rotary_dim * heads / hidden_size)
    if rank.rotary_dim is not None and int(factor * (hidden_size // heads)) != rank.rotary_dim:
        raise _wrong_setting(rank, "rotary_pct", f"its rotary frequencies are for {rank.rotary_dim} dimensions")
    theta = float(_number(rank, "rotary_emb_base", PersimmonConfig.rope_theta))
    untied = rank.settings.get("untie_embeddings")
    length = _number(rank, "max_position_embeddings", _number(rank, "seq_length", MAX_POSITION_EMBEDDINGS))
    return NewConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        max_position_embeddings=length,
        layer_norm_eps=_number(rank, "layernorm_epsilon", PersimmonConfig.layer_norm_eps),
        rope_theta=theta,
        partial_rotary_factor=factor,
        qk_layernorm=qk_norm in tensors,
        tie_word_embeddings=not untied if isinstance(untied, bool) else "lm_head.weight" not in tensors,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )


def _shape(rank: Rank, tensors: Mapping[str, TensorSource], name: str) -> tuple[int, int]:
    match tensors[name].shape if name in tensors else None:
        case (int(rows), int(columns)) if rows and columns:
            return rows, columns
        case None:
            raise CheckpointError(f"{rank.region}: the tensor that Transformers calls {name} is missing")
        case shape:
            raise CheckpointError(f"{rank.region}: {name} has shape {list(shape)}; expected a matrix")


def _number(rank: Rank, key: str, default: float) -> Any:
    value = rank.settings.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, type(default) | int) or not 0 < value < 1e9:
        raise _wrong_setting(rank, key, "expected a positive number")
    return value


def _wrong_setting(rank: Rank, key: str, needed: str) -> CheckpointError:
    value = rank.settings.get(key)
    shown = repr(value)[:80] if isinstance(value, str | int | float | bool) else type(value).__name__
    return CheckpointError(f"{rank.region}: {key} in its args is {shown}, but {needed}")
