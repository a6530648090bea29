"""A small random checkpoint in Hugging Face layout, written without Transformers, whose import takes seconds.

For conversions, of which the result is compared with it number by number: nothing is computed with it.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from persimmon.model.checkpoint import dummy_tensors
from persimmon.model.convert.new_config import NewConfig
from tests.model.checkpoints import DEMO, DEMO_END_OF_TEXT, DEMO_VOCAB_SIZE


def plain_checkpoint(
    folder: Path,
    *,
    hidden_size: int = 64,
    intermediate_size: int = 128,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 2,
    vocab_size: int = DEMO_VOCAB_SIZE,
    qk_layernorm: bool = True,
    tie_word_embeddings: bool = False,
    partial_rotary_factor: float = 0.5,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Writes a checkpoint with the demo's tokenizer.

    Args:
        folder: where to write; made if need be.
        hidden_size: and the following, up to partial_rotary_factor: as in config.json.
        intermediate_size: width of the MLP.
        num_hidden_layers: layers.
        num_attention_heads: heads.
        vocab_size: rows of the embedding.
        qk_layernorm: with norms of queries and keys.
        tie_word_embeddings: without lm_head.
        partial_rotary_factor: share of each head that is turned.
        dtype: of the stored tensors.

    Returns:
        The folder.
    """
    config = NewConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        max_position_embeddings=2048,
        layer_norm_eps=1e-5,
        rope_theta=25000.0,
        partial_rotary_factor=partial_rotary_factor,
        qk_layernorm=qk_layernorm,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=DEMO_END_OF_TEXT,
        eos_token_id=DEMO_END_OF_TEXT,
    )
    folder.mkdir(parents=True, exist_ok=True)
    files = config.files(str(dtype).removeprefix("torch."), {})
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_bytes(files[name])
    tensors = dict(dummy_tensors(config.checked(folder), dtype, "cpu", seed=0))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.model", "tokenizer_config.json", "tokenizer.json"):
        shutil.copyfile(DEMO / name, folder / name)
    return folder
