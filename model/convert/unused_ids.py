"""Which token ids of a checkpoint are unused: by its small files, no text is tokenized to them and nothing names them.

Knows SentencePiece's types of pieces, and where Hugging Face's files name tokens.  Knows nothing of tensors: what an
untrained row looks like depends on how the others were trained, so rows would prove nothing.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto

from persimmon.model.config import PersimmonConfig
from persimmon.model.errors import CheckpointError
from persimmon.model.json_object import JsonObject
from persimmon.model.sentencepiece_backend import MODEL_FILES, parse_model
from persimmon.model.tokenizer import Tokenizer
from persimmon.model.tokenizer_settings import END_OF_TEXT, special_tokens

_Piece = ModelProto.SentencePiece
_NEVER_IN_TEXT = (_Piece.CONTROL, _Piece.UNUSED)

_NETWORK_FILES = ("config.json", "generation_config.json")
_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")

_IMAGE_PIECES = ("|SPEAKER|", "|NEWLINE|", "<s>")
"""What FuyuProcessor makes a prompt's images of."""

_MAX_RUNS_SHOWN = 4

_Contents = Mapping[str, Mapping[str, Any]]


class Vocabulary:
    """A checkpoint's token ids, and what its small files state about them.

    Args:
        source: the checkpoint, for messages.
        files: its small files' contents by their names.
        config: its network.

    Raises:
        CheckpointError: there is no tokenizer, or a file is damaged.
    """

    def __init__(self, source: str, files: Mapping[str, bytes], config: PersimmonConfig) -> None:
        name = next((name for name in MODEL_FILES if name in files), None)
        if name is None:
            raise CheckpointError(f"{source}: no {MODEL_FILES[0]}, which is needed to find the unused token ids")
        model = parse_model(files[name], Path(source, name))
        self._source = source
        self._pieces: Sequence[Any] = model.pieces
        self._size = config.vocab_size
        contents = {
            name: JsonObject.parse(Path(source, name), files[name]).values
            for name in (*_NETWORK_FILES, *_TOKENIZER_FILES)
            if name in files
        }
        templates = [content.decode(errors="replace") for name, content in files.items() if "chat_template" in name]
        trainer = model.trainer_spec
        self._named = {
            *(trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id),
            *(config.bos_token_id, *config.eos_token_ids),
            *(() if config.vision is None else (config.vision.image_token_id,)),
            *_ids_under_keys(contents),
            *(id for id in _added_ids(contents) if id >= len(model.pieces)),
            *_ids_of_named_pieces(model.pieces, contents, templates, () if config.vision is None else _IMAGE_PIECES),
        }

    def follow(self, tokenizer: Tokenizer) -> None:
        """Counts pieces as used that are control pieces in SentencePiece's model but text in tokenizer.json.

        Args:
            tokenizer: the checkpoint's, whichever of its files decides.

        Raises:
            CheckpointError: tokenizer.json decides, and has other pieces than SentencePiece's model.
        """
        if tokenizer.uses_sentencepiece:
            return
        names = [piece.piece for piece in self._pieces]
        if tokenizer.pieces(range(len(names))) != names:
            raise CheckpointError(
                f"{self._source}: texts are tokenized with tokenizer.json, but unused ids are found in "
                f"{MODEL_FILES[0]}, and the two have different pieces; remove the one that does not belong to the "
                f"checkpoint"
            )
        self._named |= {id for id in self._of_types(*_NEVER_IN_TEXT) if tokenizer.token_bytes(id)}

    @property
    def pieces(self) -> int:
        """The tokenizer's ids.  The embedding may have more rows."""
        return len(self._pieces)

    def unused(self) -> dict[str, list[int]]:
        """The ids that no text is tokenized to and no file names, in order, by the reason.

        Pieces that the Unigram model would never choose, because others are always more probable, are not among
        them: whether they are is a matter of rounding.
        """
        candidates = {
            "control pieces, which no text is tokenized to": self._of_types(*_NEVER_IN_TEXT),
            "ids beyond the tokenizer's": range(self.pieces, self._size),
        }
        unnamed = {reason: [id for id in ids if id not in self._named] for reason, ids in candidates.items()}
        return {reason: ids for reason, ids in unnamed.items() if ids}

    def spelled(self) -> list[int]:
        """The user-defined pieces that no file names.  Text that spells one is tokenized to it, so they are used."""
        return [id for id in self._of_types(_Piece.USER_DEFINED) if id not in self._named]

    def check_may_go(self, token_ids: Iterable[int]) -> None:
        """Raises CheckpointError for an id that must not be dropped, even on request.

        Those are ids that a file names, and pieces that any text may need: words and their parts, bytes, the
        unknown.
        """
        needed = {*self._of_types(_Piece.NORMAL, _Piece.BYTE, _Piece.UNKNOWN)}
        for id in token_ids:
            if id >= self._size:
                raise CheckpointError(f"{self._source}: token id {id} does not exist; the last one is {self._size - 1}")
            if id in needed:
                raise CheckpointError(f"{self._source}: {self._show(id)} cannot be dropped: texts are tokenized to it")
            if id in self._named:
                raise CheckpointError(f"{self._source}: {self._show(id)} cannot be dropped: the files name it")

    def describe(self, token_ids: Sequence[int]) -> str:
        """Some ids in readable form: the first and the last of each run of neighbours, with their pieces."""
        runs = [
            self._show(run[0]) if len(run) == 1 else f"{self._show(run[0])} to {self._show(run[-1])}"
            for run in runs_of(token_ids)
        ]
        more = [f"and {len(runs) - _MAX_RUNS_SHOWN:,} more runs"] if len(runs) > _MAX_RUNS_SHOWN else []
        return ", ".join([*runs[:_MAX_RUNS_SHOWN], *more])

    def _of_types(self, *types: int) -> Iterator[int]:
        return (id for id, piece in enumerate(self._pieces) if piece.type in types)

    def _show(self, token_id: int) -> str:
        return f"{token_id} {self._pieces[token_id].piece!r}" if token_id < self.pieces else str(token_id)


def runs_of(token_ids: Iterable[int]) -> list[range]:
    """The ranges that ids in ascending order make."""
    runs: list[range] = []
    for id in token_ids:
        if runs and id == runs[-1].stop:
            runs[-1] = range(runs[-1].start, id + 1)
        else:
            runs.append(range(id, id + 1))
    return runs


def _ids_under_keys(contents: _Contents) -> Iterator[int]:
    """What the network's files have under keys like pad_token_id: an id or a list of them."""
    for name in _NETWORK_FILES:
        for key, value in contents.get(name, {}).items():
            if key.endswith("_token_id"):
                yield from (id for id in (value if isinstance(value, list) else [value]) if isinstance(id, int))


def _added_ids(contents: _Contents) -> Iterator[int]:
    """The ids of tokens that Transformers adds to a tokenizer, in the places where its versions have put them."""
    yield from (id for id in contents.get("added_tokens.json", {}).values() if isinstance(id, int))
    decoder = contents.get("tokenizer_config.json", {}).get("added_tokens_decoder")
    yield from (int(id) for id in (decoder if isinstance(decoder, dict) else ()) if id.isdecimal())
    listed = contents.get("tokenizer.json", {}).get("added_tokens")
    for token in listed if isinstance(listed, list) else ():
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            yield token["id"]


def _ids_of_named_pieces(
    pieces: Sequence[Any], contents: _Contents, templates: Sequence[str], more: Sequence[str]
) -> Iterator[int]:
    """The pieces that have a role in the tokenizer's settings, or that a chat template contains.

    Those that are only listed among the added tokens are not: Transformers lists every control piece there.
    """
    names, templates = {END_OF_TEXT, *more}, [*templates]
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = {key: value for key, value in contents.get(name, {}).items() if key != "added_tokens_decoder"}
        names.update(special_tokens(settings))
        templates.append(str(settings.get("chat_template", "")))
    template = "\n".join(templates)
    for id, piece in enumerate(pieces):
        if piece.piece in names or (piece.type in _NEVER_IN_TEXT and piece.piece in template):
            yield id
