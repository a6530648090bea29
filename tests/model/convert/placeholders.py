"""Checkpoints with token ids that no text gives, in the middle of the demo's vocabulary: what trimming is tested on.

Knows the files in Hugging Face layout, and nothing of the code that trims.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from tests.model.checkpoints import DEMO, DEMO_END_OF_TEXT

Piece = ModelProto.SentencePiece
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def tokenizer_model(placeholders: int, kind: int, numbers: int = 0) -> Any:
    """The demo's tokenizer with |0|, |1| and so on between <unk> and |ENDOFTEXT|, then 1000, 1001 and so on.

    Args:
        placeholders: how many.
        kind: their type.
        numbers: how many user-defined numbers follow them.
    """
    demo = ModelProto.FromString((DEMO / "tokenizer.model").read_bytes())
    model = ModelProto(trainer_spec=demo.trainer_spec, normalizer_spec=demo.normalizer_spec)
    model.pieces.extend(demo.pieces[:DEMO_END_OF_TEXT])
    model.pieces.extend(Piece(piece=f"|{number}|", score=0, type=kind) for number in range(placeholders))
    model.pieces.extend(
        Piece(piece=str(number), score=0, type=Piece.USER_DEFINED) for number in range(1000, 1000 + numbers)
    )
    model.pieces.extend(demo.pieces[DEMO_END_OF_TEXT:])
    return model


def with_placeholders(source: Path, folder: Path, count: int, kind: int = Piece.CONTROL) -> Path:
    """A copy of a checkpoint that has the demo's tokenizer, with random rows for placeholders before |ENDOFTEXT|.

    Args:
        source: a checkpoint in one safetensors file.
        folder: the copy, to be made.
        count: of the placeholders, whose ids are DEMO_END_OF_TEXT and those after it.
        kind: their type.
    """
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in TABLES:
        before, after = tensors[name][:DEMO_END_OF_TEXT], tensors[name][DEMO_END_OF_TEXT:]
        rows = torch.randn(count, before.shape[1], generator=generator) * 0.02
        tensors[name] = torch.cat([before, rows.to(before.dtype), after])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    set_tokenizer(folder, tokenizer_model(count, kind), DEMO_END_OF_TEXT + count)
    edit(folder / "config.json", {"vocab_size": len(tensors[TABLES[0]])})
    return folder


def set_tokenizer(folder: Path, model: Any, end_of_text: int) -> None:
    """Gives a checkpoint folder another tokenizer, and says in its files where |ENDOFTEXT| is."""
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    (folder / "tokenizer.json").unlink()
    for name in ("config.json", "generation_config.json"):
        edit(folder / name, {"bos_token_id": end_of_text, "eos_token_id": end_of_text})


def edit(file: Path, changes: dict[str, Any]) -> None:
    """Sets keys of a JSON file, which is made if need be."""
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(values | changes))
