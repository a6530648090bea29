"""Writes the random checkpoint that the benchmarks serve: a small Persimmon in Hugging Face layout, float32.

    python -m benchmarks.checkpoint OUT

Knows shapes and random numbers; runs no model.  Its answers are noise, made of words of the demo's tokenizer.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file

from persimmon.model.checkpoint import expected_shapes
from persimmon.model.config import PersimmonConfig

DEMO = Path(__file__).parent.parent / "model" / "demo"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")

# 33M parameters: small enough for two CPU cores, large enough that most of the work is the network's.
CONFIG: dict[str, Any] = {
    "architectures": ["PersimmonForCausalLM"],
    "model_type": "persimmon",
    "dtype": "float32",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
    "hidden_act": "relu2",
    "layer_norm_eps": 1e-5,
    "qk_layernorm": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 0.5},
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "use_cache": True,
}


def write_checkpoint(folder: Path, seed: int = 0) -> int:
    """Writes config.json, model.safetensors and the demo's tokenizer into `folder`, which is made if need be.

    Matrices are normal with standard deviation 0.02, norms the identity, biases zero.  The output matrix has
    zero rows for ids that stand for no text (control and byte tokens, ids beyond the tokenizer), so that every
    token of a greedy answer is text: each server has something to send for each token, and none waits for the
    rest of a character.

    Returns:
        The number of parameters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        shutil.copyfile(DEMO / name, folder / name)

    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: _random_tensor(name, shape, generator)
        for name, shape in expected_shapes(PersimmonConfig.from_folder(folder)).items()
    }
    output_matrix = tensors["lm_head.weight"]
    output_matrix[~_stands_for_text(folder / "tokenizer.model", rows=output_matrix.shape[0])] = 0.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def _random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if "layernorm" in name:
        return torch.ones(shape)
    return torch.randn(shape, generator=generator) * 0.02


def _stands_for_text(tokenizer_model: Path, rows: int) -> torch.Tensor:
    """A bool tensor [rows]: whether the id is a SentencePiece piece that is text by itself."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    mask = torch.zeros(rows, dtype=torch.bool)
    for token_id in range(pieces.vocab_size()):
        mask[token_id] = not (pieces.is_control(token_id) or pieces.is_unknown(token_id) or pieces.is_byte(token_id))
    return mask


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint",
        description="Write the random checkpoint that the benchmarks serve.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights [default: 0]")
    arguments = parser.parse_args()
    parameters = write_checkpoint(arguments.out, arguments.seed)
    print(f"{arguments.out}: {parameters / 1e6:.1f}M parameters, float32")


if __name__ == "__main__":
    main()
