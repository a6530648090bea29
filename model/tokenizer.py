"""Text to token ids and back: SentencePiece as the checkpoint's own file defines it.

Knows nothing of chat turns, stop strings or the network, and imports no torch: API workers use it too.
"""

import codecs
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from model.errors import CheckpointError
from model.json_object import JsonObject

END_OF_TEXT = "|ENDOFTEXT|"
"""The piece that begins and ends a text in Adept's vocabularies."""

MODEL_FILES = ("tokenizer.model", "adept_vocab.model")
"""Names of SentencePiece's file: in Hugging Face layout, and in Adept's own release."""

SETTINGS_FILE = "tokenizer_config.json"

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space inside a piece
_Piece = ModelProto.SentencePiece


class Tokenizer:
    """A checkpoint's tokenizer.  Safe to use from several threads at once.

    Text never turns into a control token: `encode("|ENDOFTEXT|")` gives the pieces that spell it.  A control
    token is in a prompt because its id was put there.

    Args:
        model: SentencePiece's model.
        bos_token_id: the id that begins a text, if the vocabulary has one.
        add_bos: whether `encode` begins with it when not told otherwise.

    Raises:
        RuntimeError: SentencePiece cannot use the model.
        ValueError: add_bos without a bos_token_id.
    """

    def __init__(self, model: Any, bos_token_id: int | None, add_bos: bool) -> None:
        if add_bos and bos_token_id is None:
            raise ValueError("add_bos is set, but there is no beginning-of-sequence token")
        self.bos_token_id = bos_token_id
        self.add_bos = add_bos
        self._processor = SentencePieceProcessor(model_proto=model.SerializeToString())
        self._dummy_prefix: bool = model.normalizer_spec.add_dummy_prefix
        unknown = model.trainer_spec.unk_surface
        self._token_bytes = [_piece_bytes(piece, unknown) for piece in model.pieces]

    @classmethod
    def from_folder(cls, folder: Path, add_bos: bool | None = None) -> Self:
        """The tokenizer of a checkpoint folder: its tokenizer.model, else its adept_vocab.model.

        tokenizer_config.json beside it is optional.  It says whether texts begin with the BOS token (without
        the file or the key they do not) and which piece that is (`|ENDOFTEXT|` where it names none).

        Args:
            folder: the checkpoint.
            add_bos: begin texts with BOS, or not; None does what tokenizer_config.json says.

        Raises:
            CheckpointError: a file is missing or damaged, or BOS is asked for and not in the vocabulary.
        """
        settings = _Settings.from_folder(folder)
        path = _model_path(folder)
        model = _read_model(path)
        _make_control(model, settings)
        bos_token_id = next((id for id, piece in enumerate(model.pieces) if piece.piece == settings.bos_token), None)
        add_bos = settings.add_bos if add_bos is None else add_bos
        if add_bos and bos_token_id is None:
            raise CheckpointError(
                f"{path}: texts are to begin with the BOS token {settings.bos_token!r}, which is not in its "
                f'vocabulary: name the right one as "bos_token" in {SETTINGS_FILE}, or turn BOS off'
            )
        try:
            return cls(model, bos_token_id, add_bos)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{path}: SentencePiece cannot load this file: {reason}") from None

    @property
    def vocab_size(self) -> int:
        """Pieces in the vocabulary; the model's embedding may have more rows."""
        return len(self._token_bytes)

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """The token ids of a text, exactly SentencePiece's own, with BOS before them where asked for.

        Args:
            text: any text; the empty one gives no ids but BOS.
            add_bos: begin with BOS, or not; None does what `self.add_bos` says.

        Raises:
            ValueError: the text holds a lone surrogate, or there is no BOS to add.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text is not valid Unicode: character {error.start} is the lone surrogate "
                f"U+{ord(text[error.start]):04X}; send a whole surrogate pair or leave it out"
            ) from None
        ids: list[int] = self._processor.encode(text)
        if not (self.add_bos if add_bos is None else add_bos):
            return ids
        if self.bos_token_id is None:
            raise ValueError("this model's vocabulary has no beginning-of-sequence token to add")
        return [self.bos_token_id, *ids]

    def decode(self, token_ids: Sequence[int], from_start: bool = False) -> str:
        """The text of some tokens.

        By default that is the text which the tokens add to what stands before them, so that a prompt and the
        decoded answer concatenate to the whole.  SentencePiece puts a space before a text when it encodes it;
        `from_start` takes that one off again, so that `decode(encode(text), from_start=True)` is the text as
        the model's normalizer left it, save that U+2581, SentencePiece's mark for a space, comes back as one.

        Control tokens, and ids outside the vocabulary (an embedding may have more rows), add nothing.  Bytes
        that are no UTF-8 become U+FFFD, one for each maximal invalid part, as Unicode recommends.

        Args:
            token_ids: ids in order.
            from_start: whether a text begins with the first of them.
        """
        text = _join(self._token_bytes, token_ids).decode(errors="replace")
        return text[1:] if from_start and self.begins_with_prefix(token_ids) else text

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Each token's own name in the vocabulary, spaces written as U+2581 and bytes like <0x0A>.

        Args:
            token_ids: ids of the vocabulary.
        """
        names: list[str] = self._processor.id_to_piece(list(token_ids))
        return names

    def token_bytes(self, token_id: int) -> bytes:
        """What a token of the vocabulary adds to a text, in UTF-8; a control token nothing."""
        return self._token_bytes[token_id]

    def text_bytes(self) -> list[bytes]:
        """What each token adds to a text, in UTF-8; nothing where no text is made of it: control tokens, and <unk>."""
        unknown = self._processor.unk_id()
        return [b"" if token_id == unknown else text for token_id, text in enumerate(self._token_bytes)]

    def detokenizer(self) -> "IncrementalDetokenizer":
        """A detokenizer for one new stream of tokens."""
        return IncrementalDetokenizer(self._token_bytes)

    def begins_with_prefix(self, token_ids: Sequence[int]) -> bool:
        """Whether the text of these tokens begins with the space that SentencePiece puts before a text."""
        if not self._dummy_prefix:
            return False
        first = next((id for id in token_ids if _join(self._token_bytes, (id,))), None)
        # By the piece, not its text: the surface of <unk> begins with a space of its own.
        return first is not None and self._processor.id_to_piece(first).startswith(_SPACE)


class IncrementalDetokenizer:
    """Turns a stream of tokens into text, giving out only text that no later token can change.

    The deltas of `push` and the end from `finish` concatenate to `Tokenizer.decode` of all ids, however they
    were split.  Held back is at most the beginning of one UTF-8 character: three bytes.

    Args:
        token_bytes: what each token id adds to the text, in UTF-8.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes the next tokens; the text that is certain now, perhaps none."""
        return self._decoder.decode(_join(self._token_bytes, token_ids))

    def finish(self) -> str:
        """The tokens have ended; what was held back, as U+FFFD since the rest of its character never came."""
        return self._decoder.decode(b"", final=True)


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
        raise CheckpointError(f"{place}: not a whole SentencePiece model ({len(content)} bytes): download it again")
    return model


def special_tokens(content: Mapping[str, Any]) -> Iterator[str]:
    """The tokens that Transformers keeps apart from text, in the places where its versions have put them.

    Args:
        content: of tokenizer_config.json, or of special_tokens_map.json.
    """
    for key, value in content.items():
        if key.endswith(("_token", "_special_tokens")) or key == "added_tokens_decoder":
            yield from _tokens_within(value)


@dataclass(frozen=True)
class _Settings:
    """What tokenizer_config.json says.

    Attributes:
        add_bos: whether prompts begin with BOS.
        bos_token: the piece that begins a text.
        boundaries: pieces that begin or end a text.
        special: other pieces that are no text.
    """

    add_bos: bool = False
    bos_token: str = END_OF_TEXT
    boundaries: frozenset[str] = frozenset({END_OF_TEXT})
    special: frozenset[str] = frozenset()

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        content = JsonObject.read(folder / SETTINGS_FILE)
        if content is None:
            return cls()
        bos_token = _token(content, "bos_token") or END_OF_TEXT
        eos_token = _token(content, "eos_token") or END_OF_TEXT
        return cls(
            add_bos=content.flag("add_bos_token", default=False),
            bos_token=bos_token,
            boundaries=frozenset({bos_token, eos_token, END_OF_TEXT}),
            special=frozenset(special_tokens(content.values)),
        )


def _token(content: JsonObject, key: str) -> str | None:
    value = content.values.get(key)
    token = value.get("content") if isinstance(value, dict) else value
    if value is None or isinstance(token, str):
        return token
    raise content.error(key, 'a string or an object with "content"')


def _tokens_within(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _tokens_within(item)
    elif isinstance(value, dict) and "content" not in value:
        yield from _tokens_within(list(value.values()))
    elif isinstance(value, dict) and value.get("special", True):
        yield from _tokens_within(value["content"])


def _model_path(folder: Path) -> Path:
    for name in MODEL_FILES:
        if (folder / name).is_file():
            return folder / name
    found = ""
    if (folder / "tokenizer.json").is_file():
        found = "; there is a tokenizer.json, but SentencePiece's own file is needed"
    raise CheckpointError(f"{folder}: no tokenizer: looked for {' and '.join(MODEL_FILES)}{found}")


def _read_model(path: Path) -> Any:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_model(content, path)


def _make_control(model: Any, settings: _Settings) -> None:
    """Makes the pieces that are no text CONTROL, the one type that SentencePiece never finds in a text.

    Some vocabularies have them as USER_DEFINED (always found) or as NORMAL (found when probable).  Of the
    NORMAL ones only those that begin or end a text are changed: a padding token may be any rare word.
    """
    for piece in model.pieces:
        if (piece.piece in settings.boundaries and piece.type in (_Piece.USER_DEFINED, _Piece.NORMAL)) or (
            piece.piece in settings.special and piece.type == _Piece.USER_DEFINED
        ):
            piece.type = _Piece.CONTROL


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


def _join(token_bytes: Sequence[bytes], token_ids: Sequence[int]) -> bytes:
    size = len(token_bytes)
    return b"".join([token_bytes[id] for id in token_ids if 0 <= id < size])
