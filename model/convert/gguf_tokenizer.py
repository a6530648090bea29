"""A GGUF file's vocabulary -> the SentencePiece model that it was made of.

Knows how llama.cpp's converters write a SentencePiece vocabulary.

They write each piece with its score and type, where the types' numbers are SentencePiece's own (gguf-py's TokenType),
but not all that a SentencePiece model says:

- Types: the one for Adept's release (ggerganov/llama.cpp, convert-persimmon-to-gguf.py) has no user-defined pieces: it
  writes them as normal ones.  Their score, 0, gives them away, since a Unigram model's scores are logarithms of
  probabilities, all below zero.
- Padding: the one for Hugging Face's layout (convert-hf-to-gguf.py) appends unused pieces "[PAD1]", "[PAD2]", ... up to
  the rows of the embedding.
- Whether the model is Unigram: assumed, as Adept's is.  Scores of BPE, which are ranks, are refused.
- How text is normalized: assumed as llama.cpp does it, with a space before the text, and nothing else changed.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from persimmon.model.errors import CheckpointError

_Piece = ModelProto.SentencePiece
_PREFIX = "tokenizer.ggml."
_PADDING = re.compile(rb"\[PAD\d+\]")


def tokenizer_model(metadata: Mapping[str, Any], place: object) -> Any:
    """SentencePiece's model, as its protobuf message.

    Args:
        metadata: of the file.
        place: the file, for messages.

    Raises:
        CheckpointError: the file has no such vocabulary, or SentencePiece cannot use it.
    """
    if (kind := metadata.get(f"{_PREFIX}model")) != "llama":
        raise CheckpointError(
            f"{place}: its vocabulary is of the kind {kind!r}; expected 'llama', which means SentencePiece: put the "
            f"original tokenizer.model next to the file"
        )
    pieces = _pieces(metadata, place)
    scores = [score for _, score, piece_type in pieces if piece_type == _Piece.NORMAL]
    if scores and all(score.is_integer() for score in scores):
        raise CheckpointError(
            f"{place}: the scores of its pieces are ranks, as of BPE; Persimmon's are of Unigram: put the original "
            f"tokenizer.model next to the file"
        )
    model = ModelProto()
    for text, score, piece_type in pieces:
        if piece_type == _Piece.NORMAL and score >= 0:
            piece_type = _Piece.USER_DEFINED
        model.pieces.add(piece=text, score=score, type=piece_type)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = TrainerSpec.UNIGRAM
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = any(piece.type == _Piece.BYTE for piece in model.pieces)
    trainer.unk_id = next((id for id, piece in enumerate(model.pieces) if piece.type == _Piece.UNKNOWN), -1)
    if trainer.unk_id >= 0:
        trainer.unk_piece = model.pieces[trainer.unk_id].piece
    trainer.bos_id = trainer.eos_id = trainer.pad_id = -1
    normalizer.name = "identity"
    normalizer.precompiled_charsmap = _bytes(metadata.get(f"{_PREFIX}precompiled_charsmap"))
    normalizer.add_dummy_prefix = metadata.get(f"{_PREFIX}add_space_prefix") is not False
    normalizer.remove_extra_whitespaces = metadata.get(f"{_PREFIX}remove_extra_whitespaces") is True
    try:
        SentencePieceProcessor(model_proto=model.SerializeToString())
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{place}: SentencePiece cannot use its vocabulary: {reason}") from None
    return model


def _pieces(metadata: Mapping[str, Any], place: object) -> list[tuple[str, float, int]]:
    """Text, score and type of each piece, without padding."""
    texts = metadata.get(f"{_PREFIX}tokens")
    scores, types = (metadata.get(f"{_PREFIX}{key}") for key in ("scores", "token_type"))
    if not isinstance(texts, list) or not texts:
        raise CheckpointError(f"{place} has no vocabulary: put the original tokenizer.model next to it")
    if not (
        isinstance(scores, np.ndarray) and isinstance(types, np.ndarray) and len(scores) == len(types) == len(texts)
    ):
        raise CheckpointError(f"{place}: its {len(texts):,} pieces do not have as many scores and types")
    count = len(texts) - _padding(texts, types)
    try:
        decoded = [text.decode() for text in texts[:count]]
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{place}: a piece of its vocabulary is not UTF-8: {error.object[:40]!r}") from None
    unknown = {*types[:count].tolist()} - {*_Piece.Type.values()}
    if unknown or not np.isfinite(scores[:count]).all():
        what = f"the unknown type {unknown.pop()}" if unknown else "a score that is not finite"
        raise CheckpointError(f"{place}: a piece of its vocabulary has {what}")
    return list(zip(decoded, scores[:count].tolist(), types[:count].tolist(), strict=True))


def _padding(texts: Sequence[bytes], types: Any) -> int:
    """How many pieces at the end are padding."""
    count = 0
    for text, piece_type in zip(reversed(texts), reversed(types.tolist()), strict=True):
        if piece_type != _Piece.UNUSED or not _PADDING.fullmatch(text):
            break
        count += 1
    return count


def _bytes(value: Any) -> bytes:
    return value.tobytes() if isinstance(value, np.ndarray) else b""
