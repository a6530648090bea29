"""tokenizer.json, the file of the `tokenizers` library: read and checked, and compared with a SentencePiece model.

Knows the parts of the file that say how text becomes tokens and how tokens become text.  Does not load the library.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from sentencepiece.sentencepiece_model_pb2 import ModelProto

from persimmon.model.errors import CheckpointError
from persimmon.model.json_object import JsonObject
from persimmon.model.token_backend import Frame
from persimmon.model.tokenizer_settings import MAX_TOKEN_ID, AddedToken, TokenizerSettings, described_token

TOKENIZER_JSON = "tokenizer.json"

_MAX_BYTES = 256 * 2**20
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_SPACE_PREFIX = {"type": "Prepend", "prepend": _SPACE}
_SPACES_REPLACED = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_UNIGRAM_MODEL = ModelProto().trainer_spec.UNIGRAM
_TEXT_TYPES = (ModelProto.SentencePiece.NORMAL, ModelProto.SentencePiece.BYTE)


@dataclass(frozen=True)
class TokenizerJson:
    """What the file says.

    Attributes:
        path: the file, for messages.
        kind: how words become tokens.
        model: the file's "model".
        vocab: spelling to id, of what was trained.
        added: tokens that are found by their spelling.
        normalizer, pre_tokenizer, decoder: as in the file.
        frame: what the post-processor puts around a text.
    """

    path: Path
    kind: Literal["Unigram", "BPE"]
    model: dict[str, Any]
    vocab: Mapping[str, int]
    added: tuple[AddedToken, ...]
    normalizer: dict[str, Any] | None
    pre_tokenizer: dict[str, Any] | None
    decoder: dict[str, Any] | None
    frame: Frame

    @classmethod
    def from_folder(cls, folder: Path) -> Self | None:
        """The file of a checkpoint folder; None where there is none.

        Raises:
            CheckpointError: it cannot be read, is damaged, or holds a kind of tokenizer that is not supported.
        """
        path = folder / TOKENIZER_JSON
        if not path.exists():
            return None
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file")
        try:
            size = path.stat().st_size
            if size > _MAX_BYTES:
                raise CheckpointError(f"{path}: has {size} bytes; a tokenizer.json has at most {_MAX_BYTES}")
            return cls.parse(path, path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None

    @classmethod
    def parse(cls, path: Path, content: bytes) -> Self:
        """The file from its content.

        Raises:
            CheckpointError: as `from_folder`.
        """
        try:
            file = JsonObject.parse(path, content)
        except RecursionError:
            raise CheckpointError(f"{path}: its JSON is nested too deeply") from None
        model = file.table("model")
        if model is None:
            raise file.error("model", "an object")
        kind, vocab = _vocabulary(model)
        added = _added_tokens(file)
        if not all(0 <= token_id < MAX_TOKEN_ID for token_id in (*vocab.values(), *(each.token_id for each in added))):
            raise CheckpointError(f"{path}: it has token ids that are not valid; expected ids below {MAX_TOKEN_ID}")
        processor = file.table("post_processor")
        return cls(
            path=path,
            kind=kind,
            model=model.values,
            vocab=vocab,
            added=added,
            normalizer=_values(file.table("normalizer")),
            pre_tokenizer=_values(file.table("pre_tokenizer")),
            decoder=_values(file.table("decoder")),
            frame=_frame(path, _values(processor)),
        )

    def agrees_with(self, model: Any, settings: TokenizerSettings) -> bool:
        """Whether this is a SentencePiece model in another form, so that both give every text the same tokens.

        True only where that follows from the files.  False may mean that it is not known.

        Args:
            model: SentencePiece's, with its control pieces marked.
            settings: of the same checkpoint, whose added tokens count as this file's.
        """
        rules, trainer = model.normalizer_spec, model.trainer_spec
        return (
            self.is_another_form_than(model) is False
            and self.kind == "Unigram"
            and self.pre_tokenizer is None
            and _steps(self.normalizer, "normalizers") == [_SPACE_PREFIX, _SPACES_REPLACED]
            and not rules.precompiled_charsmap
            and rules.add_dummy_prefix
            and rules.escape_whitespaces
            and not rules.remove_extra_whitespaces
            and self.model.get("unk_id") == trainer.unk_id
            and bool(self.model.get("byte_fallback")) == trainer.byte_fallback
            and _same_pieces(self.model["vocab"], model.pieces)
            and all(_is_piece_apart(token, model.pieces) for token in (*self.added, *settings.added))
        )

    def is_another_form_than(self, model: Any) -> bool:
        """Whether this file splits words by merges and the SentencePiece model by probabilities.

        Transformers 5 makes such a file of a Unigram model's vocabulary.  Its tokens are not those that a checkpoint
        with that model was trained on.
        """
        return bool(self.kind == "BPE" and model.trainer_spec.model_type == _UNIGRAM_MODEL)


def _values(part: JsonObject | None) -> dict[str, Any] | None:
    return None if part is None else part.values


def _vocabulary(model: JsonObject) -> tuple[Literal["Unigram", "BPE"], dict[str, int]]:
    # Old files do not name the kind.
    kind = model.text("type") or ("BPE" if "merges" in model.values else "Unigram")
    vocab = model.values.get("vocab")
    match kind:
        case "BPE" if isinstance(vocab, dict) and vocab and all(type(token_id) is int for token_id in vocab.values()):
            return "BPE", vocab
        case "Unigram" if isinstance(vocab, list) and vocab and all(map(_is_scored_piece, vocab)):
            return "Unigram", {text: token_id for token_id, (text, _) in enumerate(vocab)}
        case "BPE":
            raise model.error("vocab", "an object with an id for each token")
        case "Unigram":
            raise model.error("vocab", "a list of pairs of a token and its score")
    raise model.error("type", '"Unigram" or "BPE"')


def _is_scored_piece(entry: Any) -> bool:
    return (
        isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], (int, float))
    )


def _added_tokens(file: JsonObject) -> tuple[AddedToken, ...]:
    tokens = file.values.get("added_tokens") or []
    if not isinstance(tokens, list) or not all(isinstance(token, dict) for token in tokens):
        raise file.error("added_tokens", "a list of objects")
    return tuple(
        described_token(JsonObject(file.path, token, prefix=f"added_tokens[{place}]."))
        for place, token in enumerate(tokens)
    )


def _frame(path: Path, processor: Mapping[str, Any] | None) -> Frame:
    """What a post-processor puts around one text."""
    if processor is None:
        return Frame()
    kind = processor.get("type")
    try:
        if kind == "Sequence":
            begin: tuple[int, ...] = ()
            end: tuple[int, ...] = ()
            for inner in _objects(processor["processors"]):
                frame = _frame(path, inner)
                begin, end = (*frame.begin, *begin), (*end, *frame.end)
            return Frame(begin, end)
        if kind == "TemplateProcessing":
            return _template_frame(processor)
        if kind in ("BertProcessing", "RobertaProcessing"):
            return Frame((_integer(processor["cls"][1]),), (_integer(processor["sep"][1]),))
    except (LookupError, TypeError, ValueError):
        raise CheckpointError(f"{path}: its post_processor of type {kind!r} is not supported") from None
    if kind == "ByteLevel":
        return Frame()
    raise CheckpointError(
        f"{path}: its post_processor is {str(kind)[:40]!r}; expected one of TemplateProcessing, Sequence, ByteLevel, "
        f"BertProcessing, RobertaProcessing"
    )


def _template_frame(processor: Mapping[str, Any]) -> Frame:
    begin: list[int] = []
    end: list[int] = []
    texts = 0
    for part in _objects(processor["single"]):
        if "Sequence" in part:
            texts += 1
            continue
        token = processor["special_tokens"][part["SpecialToken"]["id"]]
        (end if texts else begin).extend(map(_integer, token["ids"]))
    if texts != 1:
        raise ValueError("a template must contain its text exactly once")
    return Frame(tuple(begin), tuple(end))


def _objects(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise TypeError("not a list of objects")
    return value


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise TypeError("not an integer")
    return value


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Any]:
    """The steps of a normalizer or decoder, each an object with a type."""
    if part is None:
        return []
    if part.get("type") != "Sequence":
        return [part]
    inner = part.get(key)
    steps: list[Any] = []
    for each in inner if isinstance(inner, list) else [None]:
        steps += _steps(each, key) if isinstance(each, dict) else [None]
    return steps


def _same_pieces(vocab: Any, pieces: Any) -> bool:
    return len(vocab) == len(pieces) and all(
        text == piece.piece
        and (piece.type != ModelProto.SentencePiece.NORMAL or math.isclose(score, piece.score, rel_tol=1e-5))
        and piece.type != ModelProto.SentencePiece.USER_DEFINED
        for (text, score), piece in zip(vocab, pieces, strict=True)
    )


def _is_piece_apart(token: AddedToken, pieces: Any) -> bool:
    """Whether an added token is only another name for a piece that no text becomes."""
    return (
        token.token_id < len(pieces)
        and pieces[token.token_id].piece == token.content
        and pieces[token.token_id].type not in _TEXT_TYPES
    )


@dataclass(frozen=True)
class Spelling:
    """How a file's decoder makes text of tokens.

    Attributes:
        text: a token's name to what it adds to a text, in UTF-8.
        strips_space: whether a text's first space is taken off again.
    """

    text: Callable[[str], bytes]
    strips_space: bool


def spelling(file: TokenizerJson) -> Spelling:
    """The decoder of a file.

    Raises:
        CheckpointError: it does something that cannot be done token by token.
    """
    replaced: list[tuple[str, str]] = []
    bytes_named = byte_level = strips = fused = False
    for step in _steps(file.decoder, "decoders") or [None]:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not fused:
                replaced.append((old, new))
            case {"type": "ByteFallback"}:
                bytes_named = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0} if fused:
                strips = start == 1
            case {"type": "Metaspace", "replacement": str(mark)}:
                replaced.append((mark, " "))
                strips = step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
            case {"type": "ByteLevel"}:
                byte_level = True
            case _:
                kind = step.get("type") if isinstance(step, dict) else None
                raise CheckpointError(
                    f"{file.path}: its decoder has the step {str(kind)[:40]!r}, which is not supported in this place; "
                    f"only Replace of a string, ByteFallback, Fuse, Strip of one space, Metaspace and ByteLevel are"
                )

    def text(name: str) -> bytes:
        if bytes_named and (match := re.fullmatch("<0x([0-9A-Fa-f]{2})>", name)):
            return bytes.fromhex(match[1])
        for old, new in replaced:
            name = name.replace(old, new)
        if byte_level and all(character in _BYTES for character in name):
            return bytes(_BYTES[character] for character in name)
        return name.encode()

    return Spelling(text, strips)


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that GPT-2's vocabularies write for bytes: printable ones themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}


_BYTES = _byte_level_alphabet()
