"""SentencePiece's own model file: text to pieces, exactly as SentencePiece does it, and tokens added to its vocabulary.

Knows nothing of tokenizer.json, and imports no torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from persimmon.model.errors import CheckpointError
from persimmon.model.regular_file import read_small
from persimmon.model.token_backend import Frame
from persimmon.model.token_finder import Part, TokenFinder
from persimmon.model.tokenizer_settings import AddedToken, TokenizerSettings

MODEL_FILES = ("tokenizer.model", "adept_vocab.model")
"""Names of SentencePiece's file: in Hugging Face layout, and in Adept's own release."""

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space inside a piece
_Piece = ModelProto.SentencePiece

MAX_MODEL_BYTES = 64 << 20
"""Of tokenizer.model, many times what a vocabulary of 262,144 pieces takes."""


class SentencePieceBackend:
    """See `TokenBackend`.  Text never becomes a control piece, since SentencePiece never finds one in a text.

    Args:
        model: SentencePiece's model.
        added: tokens beyond the pieces, or in place of some.

    Raises:
        RuntimeError: SentencePiece cannot use the model.
    """

    frame: Frame | None = None

    def __init__(self, model: Any, added: Iterable[AddedToken] = ()) -> None:
        self._added = _beyond(added, model.pieces)
        for token_id in self._added:
            if token_id < len(model.pieces):
                model.pieces[token_id].type = _Piece.UNUSED
        self._processor = SentencePieceProcessor(model_proto=model.SerializeToString())
        self._dummy_prefix: bool = model.normalizer_spec.add_dummy_prefix
        unknown = model.trainer_spec.unk_surface
        self.base_size = len(model.pieces)
        self.token_bytes = [_piece_bytes(piece, unknown) for piece in model.pieces]
        self.token_bytes += [b""] * (max(self._added, default=-1) + 1 - self.base_size)
        for token in self._added.values():
            self.token_bytes[token.token_id] = b"" if token.special else token.content.encode()
        self.unknown_ids = frozenset({self._processor.unk_id()})
        control = (
            AddedToken(token_id, piece.piece, special=True)
            for token_id, piece in enumerate(model.pieces)
            if piece.type == _Piece.CONTROL
        )
        special = (token for token in self._added.values() if token.special)
        self.specials: Mapping[str, AddedToken] = {token.content: token for token in (*control, *special)}
        self._found = TokenFinder(token for token in self._added.values() if not token.special)

    @classmethod
    def of(cls, path: Path, model: Any, added: Iterable[AddedToken] = ()) -> Self:
        """The backend of a file that has been read.

        Raises:
            CheckpointError: SentencePiece cannot use the model.
        """
        try:
            return cls(model, added)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{path}: SentencePiece cannot load this file: {reason}") from None

    def encode(self, parts: Sequence[Part]) -> list[int]:
        """See `TokenBackend`.  Text after an added token is encoded like the beginning of a text."""
        ids: list[int] = []
        for part in parts:
            for inner in (part,) if isinstance(part, int) or not self._found else self._found.split(part):
                ids += (inner,) if isinstance(inner, int) else self._processor.encode(inner)
        return ids

    def name(self, token_id: int) -> str:
        """See `TokenBackend`."""
        if token_id in self._added:
            return self._added[token_id].content
        if not 0 <= token_id < self.base_size:
            return f"token_id:{token_id}"
        piece: str = self._processor.id_to_piece(token_id)
        return piece

    def token_id(self, name: str) -> int | None:
        """See `TokenBackend`."""
        added = next((token.token_id for token in self._added.values() if token.content == name), None)
        if added is not None:
            return added
        token_id: int = self._processor.piece_to_id(name)
        return token_id if self._processor.id_to_piece(token_id) == name else None

    def begins_with_prefix(self, token_id: int) -> bool:
        """See `TokenBackend`.  By the piece, not its text: the surface of <unk> begins with a space of its own."""
        return self._dummy_prefix and token_id not in self._added and self.name(token_id).startswith(_SPACE)


def parse_model(content: bytes, place: object) -> Any:
    """SentencePiece's model from the content of its file.

    Args:
        content: of the file.
        place: where it is, for messages.

    Raises:
        CheckpointError: it is not such a file, or not whole.
    """
    model = ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError:
        raise CheckpointError(f"{place}: not a SentencePiece model, or damaged: download it again") from None
    # A file cut between two of its parts still parses, and with a part's defaults the ids would be others.
    if not model.pieces or not model.HasField("trainer_spec") or not model.HasField("normalizer_spec"):
        raise CheckpointError(f"{place}: not a complete SentencePiece model ({len(content)} bytes): download it again")
    return model


def read_model(path: Path, settings: TokenizerSettings) -> Any:
    """SentencePiece's model from a file, with the pieces that are not text marked as control pieces.

    Raises:
        CheckpointError: the file cannot be read, is not a SentencePiece model, or is damaged.
    """
    content = read_small(path, MAX_MODEL_BYTES)
    if content is None:
        raise CheckpointError(f"{path} cannot be read: No such file or directory")
    model = parse_model(content, path)
    _make_control(model, settings)
    return model


def _make_control(model: Any, settings: TokenizerSettings) -> None:
    """Makes the pieces that are not text CONTROL, the one type that SentencePiece never finds in a text.

    Some vocabularies have them as USER_DEFINED (always found) or as NORMAL (found when probable).  Of the
    NORMAL ones only those that begin or end a text are changed: a padding token may be any rare word.
    """
    for piece in model.pieces:
        if (piece.piece in settings.boundaries and piece.type in (_Piece.USER_DEFINED, _Piece.NORMAL)) or (
            piece.piece in settings.special and piece.type == _Piece.USER_DEFINED
        ):
            piece.type = _Piece.CONTROL


def _beyond(added: Iterable[AddedToken], pieces: Sequence[Any]) -> dict[int, AddedToken]:
    """By id, the added tokens that are not pieces of the model, which itself says how its pieces are found."""
    added = tuple(added)
    known = {piece.piece for piece in pieces} if added else set()
    return {token.token_id: token for token in added if token.content not in known}


def _piece_bytes(piece: Any, unknown: str) -> bytes:
    """What a piece adds to the text, in UTF-8; `unknown` is the surface of the unknown token."""
    if piece.type == _Piece.CONTROL:
        return b""
    if piece.type == _Piece.UNKNOWN:
        return unknown.encode()
    if piece.type == _Piece.BYTE:
        return bytes.fromhex(piece.piece[3:5])  # <0xE2>
    text: str = piece.piece
    return text.replace(_SPACE, " ").encode()
