"""config.json and the tokenizer's settings for a checkpoint whose source has no files in Hugging Face layout.

Knows Transformers' keys in their old and new spelling.  Knows nothing of where the values come from.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from persimmon.model.config import MODEL_TYPE, Architecture, PersimmonConfig
from persimmon.model.errors import CheckpointError

MAX_POSITION_EMBEDDINGS = 16384
"""What the public checkpoints were trained with, for a source that does not say."""

SMALL_AGAIN = "persimmon serve --quantization int8 or int4 keeps them small in memory"
"""What to do about a checkpoint that was quantized, and is not any more."""


@dataclass(frozen=True, kw_only=True)
class NewConfig:
    """What config.json has to say of a network.  The attributes are those of `PersimmonConfig`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    layer_norm_eps: float
    rope_theta: float
    partial_rotary_factor: float
    qk_layernorm: bool
    tie_word_embeddings: bool
    bos_token_id: int
    eos_token_id: int

    def values(self) -> dict[str, Any]:
        """The keys of config.json, apart from the type of the tensors."""
        rotary = {"rope_theta": self.rope_theta, "partial_rotary_factor": self.partial_rotary_factor}
        return {
            "architectures": [Architecture.CAUSAL_LM.value],
            "model_type": MODEL_TYPE,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "max_position_embeddings": self.max_position_embeddings,
            "layer_norm_eps": self.layer_norm_eps,
            # Older versions of Transformers read the first two, newer ones the table.
            **rotary,
            "rope_parameters": {"rope_type": "default", **rotary},
            "hidden_act": "relu2",
            "qk_layernorm": self.qk_layernorm,
            "tie_word_embeddings": self.tie_word_embeddings,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "use_cache": True,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
        }

    def checked(self, place: object) -> PersimmonConfig:
        """The network.

        Args:
            place: where the values come from, for the message.

        Raises:
            CheckpointError: two values contradict each other, or one is not supported.
        """
        values = self.values()
        names = {field.name for field in fields(PersimmonConfig)} & values.keys()
        try:
            return PersimmonConfig(**{name: values[name] for name in names}, eos_token_ids=(self.eos_token_id,))
        except ValueError as error:
            raise CheckpointError(f"{place}: {error}") from error

    def files(self, dtype: str | None, tokenizer_settings: Mapping[str, Any]) -> dict[str, bytes]:
        """The contents of config.json, generation_config.json and tokenizer_config.json.

        Args:
            dtype: the type of the tensors, where they have one.
            tokenizer_settings: what tokenizer_config.json says in addition to the class and the length.
        """
        values = self.values()
        if dtype is not None:
            values["torch_dtype"] = dtype
        settings = {
            "tokenizer_class": "LlamaTokenizer",
            **tokenizer_settings,
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.max_position_embeddings,
        }
        ids = {key: values[key] for key in ("bos_token_id", "eos_token_id")}
        contents = {"config.json": values, "generation_config.json": ids, "tokenizer_config.json": settings}
        return {name: json.dumps(content, indent=2).encode() + b"\n" for name, content in contents.items()}
