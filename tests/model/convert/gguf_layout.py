"""Checkpoints in llama.cpp's layout: what tests convert from.

Written by the gguf package, with the names and values that llama.cpp's scripts for Persimmon wrote; the docstring of
persimmon.model.convert.gguf says which.  Knows nothing of the code that converts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor

from persimmon.model.config import PersimmonConfig

END_OF_TEXT = 1
_TYPES = {str: "string", bool: "bool", int: "uint32", float: "float32", list: "array"}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.final_layernorm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.query_key_value": "attn_qkv",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "self_attn.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor, by Hugging Face's."""
    module, kind = name.rsplit(".", 1)
    if not module.startswith("model.layers."):
        return f"{_NAMES[module]}.{kind}"
    _, _, number, part = module.split(".", 3)
    return f"blk.{number}.{_NAMES[part]}.{kind}"


def make_gguf(
    original: Path,
    path: Path,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    changes: Mapping[str, Any] | None = None,
    padding: int = 0,
    blocks: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> Path:
    """Writes a checkpoint of Hugging Face layout as GGUF.

    Args:
        original: the checkpoint, in one safetensors file, with tokenizer.model.
        path: the file to write.
        kind: the type of matrices; vectors are F32.
        changes: of the metadata, by key; None leaves a key out.
        padding: unused pieces after the vocabulary, as for an embedding with more rows.
        blocks: matrices of that type by their Hugging Face names, in place of the checkpoint's: rows of bytes.
    """
    config = PersimmonConfig.from_folder(original)
    metadata = {
        "general.name": "persimmon-8b-chat",
        "persimmon.context_length": config.max_position_embeddings,
        "persimmon.embedding_length": config.hidden_size,
        "persimmon.block_count": config.num_hidden_layers,
        "persimmon.feed_forward_length": config.intermediate_size,
        "persimmon.rope.dimension_count": config.rotary_dim,
        "persimmon.attention.head_count": config.num_attention_heads,
        "persimmon.attention.head_count_kv": config.num_attention_heads,
        "persimmon.rope.freq_base": config.rope_theta,
        "persimmon.attention.layer_norm_epsilon": config.layer_norm_eps,
        **vocabulary(original / "tokenizer.model", padding),
        "tokenizer.ggml.bos_token_id": END_OF_TEXT,
        "tokenizer.ggml.eos_token_id": END_OF_TEXT,
        **(changes or {}),
    }
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", "persimmon"))
    for key, value in metadata.items():
        if value is not None:
            getattr(writer, f"add_{_TYPES[type(value)]}")(key, value)
    for name, tensor in load_file(original / "model.safetensors").items():
        numbers = tensor.float().numpy()
        of = kind if numbers.ndim == 2 else GGMLQuantizationType.F32
        stored = (blocks or {}).get(name)
        writer.add_tensor(gguf_name(name), gguf.quantize(numbers, of) if stored is None else stored, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vocabulary(model: Path, padding: int = 0) -> dict[str, Any]:
    """A SentencePiece model's pieces as the scripts write them: they do not ask which ones are user-defined."""
    processor = SentencePieceProcessor(str(model))
    ids = range(processor.vocab_size())
    types = [
        next((number for number, is_of in _KINDS.items() if getattr(processor, is_of)(token_id)), 1) for token_id in ids
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(token_id) for token_id in ids]
        + [f"[PAD{number}]" for number in range(1, padding + 1)],
        "tokenizer.ggml.scores": [float(processor.get_score(token_id)) for token_id in ids] + [-1000.0] * padding,
        "tokenizer.ggml.token_type": types + [5] * padding,
    }


_KINDS = {2: "is_unknown", 3: "is_control", 5: "is_unused", 6: "is_byte"}
