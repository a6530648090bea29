"""Checkpoints in the layout of Adept's release, made of ones in Hugging Face layout.

Knows names, nesting and splits as Adept's own loading code has them (github.com/persimmon-ai-labs/adept-inference,
megatron/checkpointing.py, megatron/model and megatron/mpu/layers.py), and nothing of the code that converts them.
"""

import argparse
import shutil
import sys
import tarfile
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from persimmon.model.config import PersimmonConfig

WEIGHTS = "model_optim_rng.pt"


def settings(config: PersimmonConfig, ranks: int, **changes: Any) -> argparse.Namespace:
    """Megatron's arguments, those that determine the network; and one of a class that exists nowhere else."""
    values = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "kv_channels": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "padded_vocab_size": config.vocab_size,
        "layernorm_epsilon": config.layer_norm_eps,
        "pos_emb": "rotary",
        "rotary_pct": config.partial_rotary_factor,
        "rotary_emb_base": 25000,
        "untie_embeddings": not config.tie_word_embeddings,
        "sq_relu": True,
        "qk_layernorm": "weights_per_layer" if config.qk_layernorm else "none",
        "apply_residual_connection_post_layernorm": False,
        "tensor_model_parallel_size": ranks,
        "params_dtype": torch.bfloat16,
        "model_type": _class_of_adept()(),
    }
    return argparse.Namespace(**(values | changes))


def rank_tensors(tensors: dict[str, torch.Tensor], rank: int, ranks: int) -> dict[str, Any]:
    """One rank's part of a network, under the key "model" of its file.

    The heads of a rank are neighbours; the rows of query_key_value are ordered per head already.
    """

    def part(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor.chunk(ranks, dim)[rank].clone()

    encoder: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith(("model.layers.", "model.final_layernorm.")):
            continue
        key = name.removeprefix("model.").replace("self_attn", "self_attention")
        if "query_key_value" in key or "dense_h_to_4h" in key:
            encoder[key] = part(tensor, 0)
        elif key.endswith(("self_attention.dense.weight", "dense_4h_to_h.weight")):
            encoder[key] = part(tensor, 1)
        else:
            encoder[key] = tensor.clone()
    embedding = {"word_embeddings": {"weight": part(tensors["model.embed_tokens.weight"], 0)}}
    model: dict[str, Any] = {"language_model": {"embedding": embedding, "encoder": encoder}}
    if "lm_head.weight" in tensors:
        model["word_embeddings_for_head"] = {"weight": part(tensors["lm_head.weight"], 0)}
    return model


def make_release(
    original: Path,
    folder: Path,
    *,
    ranks: int = 1,
    new_format: bool = True,
    iteration: int = 1000,
    with_args: bool = True,
    with_rotary_frequencies: bool = False,
    **changes: Any,
) -> Path:
    """Writes a checkpoint of Hugging Face layout in Adept's.

    Args:
        original: the checkpoint, in one safetensors file, with tokenizer.model.
        folder: where to write; made if need be.
        ranks: tensor-parallel ranks to split it over.
        new_format: PyTorch's zip, or the format before it.
        iteration: of training; names a folder.
        with_args: whether Megatron's arguments are in the files.
        with_rotary_frequencies: whether each layer stores those, as Megatron's module does.
        changes: of the arguments.

    Returns:
        The folder.
    """
    config = PersimmonConfig.from_folder(original)
    tensors = load_file(original / "model.safetensors")
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        model = rank_tensors(tensors, rank, ranks)
        if with_rotary_frequencies:
            for layer in range(config.num_hidden_layers):
                key = f"layers.{layer}.self_attention.rotary_emb.inv_freq"
                model["language_model"]["encoder"][key] = torch.rand(config.rotary_dim // 2)
        contents = {
            "checkpoint_version": 3.0,
            "iteration": iteration,
            "model": model,
            "rng_state": [{"random_rng_state": (3, tuple(range(625)), None), "torch_rng_state": torch.get_rng_state()}],
        }
        if with_args:
            contents["args"] = settings(config, ranks, **changes)
        path = folder / f"iter_{iteration:07d}" / f"mp_rank_{rank:02d}" / WEIGHTS
        path.parent.mkdir(parents=True)
        torch.save(contents, path, _use_new_zipfile_serialization=new_format)
    sys.modules.pop("megatron_of_adept", None)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    shutil.copyfile(original / "tokenizer.model", folder / "adept_vocab.model")
    return folder


def as_tar(folder: Path, mode: str = "w") -> Path:
    """The folder in a tar next to it."""
    path = folder.with_suffix(".tar")
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        archive.add(folder, arcname=folder.name)
    return path


def _class_of_adept() -> type:
    """A class that can be found while the file is written, and no more when it is read."""
    module = types.ModuleType("megatron_of_adept")
    kind = type("ModelType", (), {"__module__": module.__name__})
    module.ModelType = kind  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    return kind
