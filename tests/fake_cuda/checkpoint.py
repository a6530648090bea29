"""A checkpoint small enough for Triton's interpreter, with a tokenizer; written quickly, without Transformers."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from persimmon.model.checkpoint import expected_shapes
from persimmon.model.config import PersimmonConfig
from tests.model.checkpoints import DEMO

VOCAB_SIZE = 260
"""The demo's first tokens: the bytes."""


def write_checkpoint(folder: Path) -> Path:
    """One layer with one head of 64, random weights in float16 and the demo's byte tokens."""
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 128}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 96}
    config = json.loads((DEMO / "config.json").read_text()) | sizes
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = ModelProto.FromString((DEMO / "tokenizer.model").read_bytes())
    del tokenizer.pieces[VOCAB_SIZE:]
    (folder / "tokenizer.model").write_bytes(tokenizer.SerializeToString())
    (folder / "tokenizer_config.json").write_bytes((DEMO / "tokenizer_config.json").read_bytes())
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) + name.endswith("norm.weight")
        for name, shape in expected_shapes(PersimmonConfig.from_folder(folder)).items()
    }
    save_file({name: own.half() for name, own in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder
