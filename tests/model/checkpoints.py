"""Small random Persimmon checkpoints, written by Transformers: what tests and benchmarks load and compare with.

Knows nothing of the server's own code: names, shapes and config.json are Transformers'.
"""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

DEMO = Path(__file__).parents[2] / "model" / "demo"
DEMO_VOCAB_SIZE = 4096
DEMO_END_OF_TEXT = 1
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "tokenizer.json")


def make_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    hidden_size: int = 128,
    num_hidden_layers: int = 3,
    num_attention_heads: int = 2,
    intermediate_size: int = 512,
    vocab_size: int = DEMO_VOCAB_SIZE,
    max_position_embeddings: int = 2048,
    qk_layernorm: bool = True,
    tie_word_embeddings: bool = False,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "50GB",
    architecture: str = "PersimmonForCausalLM",
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint whose every parameter matters: without any norm or bias, greedy output is another.

    Norm weights are uniform in 0.5 to 1.5 and biases N(0, 0.2²), far from the ones and zeros they start as;
    those of queries and keys are twice that.  Matrices keep the scale of what passes through, but attention's
    output is doubled, and each token's embedding stands out from the biases.  So a head looks at few
    positions, a token depends on where and after what it stands, and greedy output goes on changing.  (Not
    with tie_word_embeddings: there a token's likeliest successor is itself.) The demo's tokenizer lies next to
    it where its ids fit.

    Args:
        folder: where to write; made if need be.
        seed: the same seed makes the same checkpoint.
        hidden_size: and the following, up to tie_word_embeddings: as in config.json.
        num_hidden_layers: layers.
        num_attention_heads: heads.
        intermediate_size: width of the MLP.
        vocab_size: at least DEMO_VOCAB_SIZE for the demo's tokenizer.
        max_position_embeddings: longest sequence.
        qk_layernorm: with norms of queries and keys.
        tie_word_embeddings: without lm_head.
        dtype: of the stored tensors.
        max_shard_size: larger checkpoints become several files with an index, as in save_pretrained.
        architecture: the name of Transformers' class.
        settings: what else config.json says, like a classifier's id2label.

    Returns:
        The folder.
    """
    import transformers  # takes seconds; few tests need it

    config = transformers.PersimmonConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 0.5},
        qk_layernorm=qk_layernorm,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=DEMO_END_OF_TEXT,
        eos_token_id=DEMO_END_OF_TEXT,
        **(settings or {}),
    )
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    draw_parameters(model, seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    if vocab_size >= DEMO_VOCAB_SIZE:
        for name in _TOKENIZER_FILES:
            shutil.copyfile(DEMO / name, folder / name)
    return folder


def draw_parameters(model: torch.nn.Module, seed: int) -> None:
    """Draws the parameters of a model of Transformers, as `make_checkpoint` describes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2, generator=generator)
            elif name.endswith(".embed_tokens.weight"):
                parameter.normal_(0, 1, generator=generator)
            else:
                parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]), generator=generator)
            # The numbers of a patch are within -1 and 1.
            if any(part in name for part in ("q_layernorm", "k_layernorm", "self_attn.dense.weight", "vision")):
                parameter.mul_(2)
