"""Writes the random checkpoints that the benchmarks serve: Persimmons in Hugging Face layout.

    python -m benchmarks.checkpoint OUT [--shape random-1b] [--zeros 0.9]

Knows shapes and random numbers; runs no model.  Its answers are noise, made of words of the demo's tokenizer.
"""

import argparse
import json
import math
import shutil
import statistics
from collections.abc import Mapping
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

# 940M parameters: 1.9 GB in 16 bits, so that a token is a matter of reading them from memory.
CONFIG_1B: dict[str, Any] = CONFIG | {
    "dtype": "bfloat16",
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
}

RANDOM: Mapping[str, Mapping[str, Any]] = {"random": CONFIG, "random-1b": CONFIG_1B}
"""The shapes, by their names on command lines."""

DEVIATION = 0.02


def write_checkpoint(folder: Path, seed: int = 0, *, shape: str = "random", zeros: float = 0.5) -> int:
    """Writes config.json, model.safetensors and the demo's tokenizer into `folder`, which is made if need be.

    Matrices are normal with standard deviation 0.02, norms the identity, biases zero.  The output matrix has
    zero rows for ids that stand for no text (control and byte tokens, ids beyond the tokenizer), so that every
    token of a greedy answer is text: each server has something to send for each token, and none waits for the
    rest of a character.

    Args:
        folder: to write.
        seed: of the matrices.
        shape: one of RANDOM.
        zeros: the share of squared-ReLU activations that are zero, on average; of a trained network 0.9 or more.
            Other than one half, it is made by the biases of the up projections.

    Returns:
        The number of parameters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(RANDOM[shape], indent=2) + "\n")
    for name in TOKENIZER_FILES:
        shutil.copyfile(DEMO / name, folder / name)

    generator = torch.Generator().manual_seed(seed)
    config = PersimmonConfig.from_folder(folder)
    # What is projected up is a normed row, so its products are normal with this deviation.
    up_bias = -statistics.NormalDist().inv_cdf(zeros) * DEVIATION * math.sqrt(config.hidden_size)
    tensors = {
        name: _random_tensor(name, size, generator, up_bias).to(getattr(torch, RANDOM[shape]["dtype"]))
        for name, size in expected_shapes(config).items()
    }
    output_matrix = tensors["lm_head.weight"]
    output_matrix[~_stands_for_text(folder / "tokenizer.model", rows=output_matrix.shape[0])] = 0.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def checkpoint_named(name: str, folder: Path) -> Path:
    """The folder of a checkpoint that a command line names.

    Args:
        name: "demo", or one of RANDOM.
        folder: where a random one is written, unless it is there.
    """
    if name == "demo":
        return DEMO
    if not (folder / "model.safetensors").exists():
        write_checkpoint(folder, shape=name)
    return folder


CONFIG_OUTLIERS: dict[str, Any] = CONFIG | {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
OUTLIER_CHANNELS = (17, 101, 230)
OUTLIER_FACTOR = 30.0


def write_outlier_checkpoint(folder: Path, seed: int = 0) -> None:
    """Writes a small random network some of whose channels are far larger than the rest, as in trained ones.

    Three channels of the residual stream are 30 times as large in all that adds to it, so rows that are rounded
    together have to hold them; and the same columns of all matrices that read it are 30 times as small, so that these
    channels matter as much as the others.  The logits have a standard deviation of about 3: a few tokens are likely.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG_OUTLIERS, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        shutil.copyfile(DEMO / name, folder / name)
    generator = torch.Generator().manual_seed(seed)
    channels = list(OUTLIER_CHANNELS)
    tensors = {}
    for name, size in expected_shapes(PersimmonConfig.from_folder(folder)).items():
        tensor = _random_tensor(name, size, generator, up_bias=0.0)
        if len(size) == 2:
            tensor *= size[1] ** -0.5 / DEVIATION
        if name == "model.embed_tokens.weight":
            tensor[:, channels] *= OUTLIER_FACTOR
        elif name.endswith(("dense.weight", "dense_4h_to_h.weight")):
            tensor[channels] *= OUTLIER_FACTOR
        elif len(size) == 2:
            tensor[:, channels] /= OUTLIER_FACTOR
        if name == "lm_head.weight":
            tensor *= 3.0
        tensors[name] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _random_tensor(name: str, size: tuple[int, ...], generator: torch.Generator, up_bias: float) -> torch.Tensor:
    if name.endswith(".bias"):
        return torch.full(size, up_bias if name.endswith("dense_h_to_4h.bias") else 0.0)
    if "layernorm" in name:
        return torch.ones(size)
    return torch.randn(size, generator=generator) * DEVIATION


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
        description="Write a random checkpoint that the benchmarks serve.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights [default: 0]")
    parser.add_argument("--shape", choices=RANDOM, default="random", help="[default: %(default)s]")
    parser.add_argument(
        "--zeros", type=float, default=0.5, help="share of squared-ReLU activations that are 0 [default: %(default)s]"
    )
    arguments = parser.parse_args()
    parameters = write_checkpoint(arguments.out, arguments.seed, shape=arguments.shape, zeros=arguments.zeros)
    print(f"{arguments.out}: {parameters / 1e6:.1f}M parameters, {RANDOM[arguments.shape]['dtype']}")


if __name__ == "__main__":
    main()
