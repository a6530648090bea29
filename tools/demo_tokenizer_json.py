"""Writes a tokenizer.json and a tokenizer_config.json that give the token ids of a SentencePiece Unigram model.

python -m tools.demo_tokenizer_json FOLDER
"""

import json
import sys
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from tools.train_demo import END_OF_TEXT


def write(folder: Path) -> None:
    """Reads a folder's tokenizer.model and writes the two files beside it."""
    path = folder / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    end = sentencepiece.SentencePieceProcessor(str(path)).piece_to_id(END_OF_TEXT)
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=model.trainer_spec.unk_id, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [AddedToken(name, normalized=False, special=True) for name in ("<unk>", END_OF_TEXT)]
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT}:0 $A:0",
        pair=f"{END_OF_TEXT}:0 $A:0 {END_OF_TEXT}:1 $B:1",
        special_tokens=[(END_OF_TEXT, end)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
