"""Text to token ids and back, as a checkpoint's own files define it.

Chooses between SentencePiece's model file and tokenizer.json.  Knows nothing of chat turns, stop strings or the
network, and imports no torch: API workers use it too.
"""

import codecs
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from persimmon.model.errors import CheckpointError
from persimmon.model.sentencepiece_backend import MODEL_FILES, SentencePieceBackend, read_model
from persimmon.model.token_backend import Frame, TokenBackend
from persimmon.model.token_finder import Part, TokenFinder
from persimmon.model.tokenizer_json import TOKENIZER_JSON, TokenizerJson
from persimmon.model.tokenizer_settings import END_OF_TEXT, SETTINGS_FILE, AddedToken, TokenizerSettings
from persimmon.model.tokenizers_backend import TokenizersBackend

__all__ = ["END_OF_TEXT", "IncrementalDetokenizer", "Tokenizer"]


class Tokenizer:
    """A checkpoint's tokenizer.  Safe to use from several threads at once.

    Text never turns into a control token: `encode("|ENDOFTEXT|")` gives the pieces that spell it.  A control
    token is in a prompt because its id was put there.  Tokens that were added to the vocabulary are one id each.

    Args:
        backend: the vocabulary, and how text becomes its tokens.
        bos_token_id: the id that begins a text, if the vocabulary has one.
        frame: what `encode` puts around a text by default.
        notices: sentences for the operator about how the checkpoint's files were understood.
    """

    def __init__(
        self, backend: TokenBackend, bos_token_id: int | None, frame: Frame, notices: Sequence[str] = ()
    ) -> None:
        self.bos_token_id = bos_token_id
        self.notices = tuple(notices)
        self._backend = backend
        self._frame = frame
        self._token_bytes = backend.token_bytes
        # A prompt may spell the special tokens that were added to the vocabulary, never those that it was trained with.
        self._spelled = TokenFinder(token for token in backend.specials.values() if token.token_id >= backend.base_size)

    @classmethod
    def from_folder(cls, folder: Path, add_bos: bool | None = None) -> Self:
        """The tokenizer of a checkpoint folder.

        SentencePiece's file decides where there is no tokenizer.json, where tokenizer.json is the same in another
        form, and where that is a BPE made of a Unigram model's vocabulary.  Otherwise tokenizer.json decides, as in
        Transformers.

        Texts begin with BOS, and end with EOS, where tokenizer_config.json says so; where it says nothing, as the
        post-processor of tokenizer.json has it.

        Args:
            folder: the checkpoint.
            add_bos: begin texts with BOS, or not; None does what the checkpoint says.

        Raises:
            CheckpointError: a file is missing or damaged, or BOS is asked for and not in the vocabulary.
        """
        settings = TokenizerSettings.from_folder(folder)
        path = next((folder / name for name in MODEL_FILES if os.path.lexists(folder / name)), None)
        file = TokenizerJson.from_folder(folder)
        notices: list[str] = []
        backend = _backend(folder, path, file, settings, notices)
        place = path or folder / TOKENIZER_JSON
        bos_token_id = backend.token_id(settings.bos_token)
        frame = backend.frame or (file.frame if file is not None else Frame())
        begin = frame.begin
        if bos_token_id is None and begin:
            bos_token_id = begin[0]
        wanted = settings.add_bos if add_bos is None else add_bos
        if add_bos is None and wanted is not None and file is not None and wanted != bool(begin):
            notices.append(
                f"{SETTINGS_FILE} has add_bos_token {str(wanted).lower()}, but the post-processor of {TOKENIZER_JSON} "
                f"does the opposite: using the former (give --add-bos {str(not wanted).lower()} for the latter)"
            )
        if wanted and not begin:
            if bos_token_id is None:
                raise CheckpointError(
                    f"{place}: texts begin with the BOS token {settings.bos_token!r}, which is not in its "
                    f'vocabulary: set "bos_token" in {SETTINGS_FILE} to the right one, or turn BOS off'
                )
            begin = (bos_token_id,)
        elif wanted is False:
            begin = ()
        return cls(
            backend=backend,
            bos_token_id=bos_token_id,
            frame=Frame(begin, _end(backend, settings, frame)),
            notices=notices,
        )

    @property
    def add_bos(self) -> bool:
        """Whether `encode` begins with BOS by default."""
        return bool(self._frame.begin)

    @property
    def begin(self) -> tuple[int, ...]:
        """What `encode` begins with by default."""
        return self._frame.begin

    @property
    def uses_sentencepiece(self) -> bool:
        """Whether SentencePiece's file decides, not tokenizer.json."""
        return isinstance(self._backend, SentencePieceBackend)

    @property
    def vocab_size(self) -> int:
        """Token ids of the vocabulary; the model's embedding may have more rows."""
        return len(self._token_bytes)

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """The token ids of a text, with BOS before them and EOS after them where asked for.

        Args:
            text: any text; the empty one gives no ids but BOS.
            add_bos: begin with BOS, or put nothing around the text; None does what the checkpoint says.

        Raises:
            ValueError: the text holds a lone surrogate, or there is no BOS to add.
        """
        return self.encode_parts(self._spelled.split(text) if self._spelled else [text], add_bos)

    def encode_parts(self, parts: Sequence[Part], add_bos: bool | None = None) -> list[int]:
        """The token ids of a prompt some of whose tokens are known; no text in it becomes a special token.

        Args:
            parts: texts, and ids of special tokens.
            add_bos: as `encode` has it.

        Raises:
            ValueError: as `encode`.
        """
        for part in parts:
            if isinstance(part, str):
                _check_unicode(part)
        ids = self._backend.encode(parts)
        if add_bos is False:
            return ids
        begin = self._frame.begin
        if add_bos and not begin:
            if self.bos_token_id is None:
                raise ValueError("this model's vocabulary has no beginning-of-sequence token to add")
            begin = (self.bos_token_id,)
        return [*begin, *ids, *self._frame.end]

    def special_finder(self, placeholders: Iterable[int] = ()) -> TokenFinder:
        """Finds every special token, control tokens too, in what a chat template has written.

        Args:
            placeholders: ids of further tokens to find: those that stand for something else, special or not.
        """
        named = {token_id: AddedToken(token_id, self._backend.name(token_id)) for token_id in placeholders}
        tokens = {**named, **{token.token_id: token for token in self._backend.specials.values()}}
        # One of a single character could not be hidden in a message.
        return TokenFinder(token for token in tokens.values() if len(token.content) > 1)

    def decode(self, token_ids: Sequence[int], from_start: bool = False) -> str:
        """The text of some tokens.

        By default that is the text which the tokens add to what stands before them, so that a prompt and the
        decoded answer concatenate to the whole.  SentencePiece puts a space before a text when it encodes it;
        `from_start` takes that one off again, so that `decode(encode(text), from_start=True)` is the text as
        the model's normalizer left it, save that U+2581, SentencePiece's mark for a space, comes back as one.

        Special tokens, and ids outside the vocabulary (an embedding may have more rows), add nothing.  Bytes
        that are not valid UTF-8 become U+FFFD, one for each maximal invalid part, as Unicode recommends.

        Args:
            token_ids: ids in order.
            from_start: whether a text begins with the first of them.
        """
        text = _join(self._token_bytes, token_ids).decode(errors="replace")
        return text[1:] if from_start and self.begins_with_prefix(token_ids) else text

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Each token's own name in the vocabulary, in SentencePiece's spaces written as U+2581 and bytes like <0x0A>.

        Args:
            token_ids: any ids; one outside the vocabulary is named like "token_id:5".
        """
        return [self._backend.name(token_id) for token_id in token_ids]

    def token_id(self, name: str) -> int | None:
        """The id of a token by its name in the vocabulary; None where there is none of that name."""
        return self._backend.token_id(name)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token of the vocabulary adds to a text, in UTF-8; a special token nothing."""
        return self._token_bytes[token_id]

    def text_bytes(self) -> list[bytes]:
        """What each token adds to a text, in UTF-8; nothing where no text is made of it: special tokens, and <unk>."""
        unknown = self._backend.unknown_ids
        return [b"" if token_id in unknown else text for token_id, text in enumerate(self._token_bytes)]

    @property
    def all_token_bytes(self) -> Sequence[bytes]:
        """What each token adds to a text, in UTF-8, by its id."""
        return self._token_bytes

    def detokenizer(self) -> "IncrementalDetokenizer":
        """A detokenizer for one new stream of tokens."""
        return IncrementalDetokenizer(self._token_bytes)

    def begins_with_prefix(self, token_ids: Sequence[int]) -> bool:
        """Whether the text of these tokens begins with the space that encoding puts before a text."""
        first = next((id for id in token_ids if _join(self._token_bytes, (id,))), None)
        return first is not None and self._backend.begins_with_prefix(first)


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


def _backend(
    folder: Path, path: Path | None, file: TokenizerJson | None, settings: TokenizerSettings, notices: list[str]
) -> TokenBackend:
    if path is None:
        if file is None:
            raise CheckpointError(f"{folder}: no tokenizer: looked for {', '.join(MODEL_FILES)} and {TOKENIZER_JSON}")
        return TokenizersBackend(file, settings)
    model = read_model(path, settings)
    if file is None:
        return SentencePieceBackend.of(path, model, settings.added)
    if file.is_another_form_than(model):
        notices.append(
            f"{TOKENIZER_JSON} is a BPE model made from the vocabulary of {path.name}, which is a Unigram model: "
            f"using {path.name}"
        )
        return SentencePieceBackend.of(path, model, (*file.added, *settings.added))
    if file.agrees_with(model, settings):
        return SentencePieceBackend.of(path, model)
    return TokenizersBackend(file, settings)


def _end(backend: TokenBackend, settings: TokenizerSettings, frame: Frame) -> tuple[int, ...]:
    if settings.add_eos is None or settings.add_eos == bool(frame.end):
        return frame.end
    eos_token_id = backend.token_id(settings.eos_token)
    return (eos_token_id,) if settings.add_eos and eos_token_id is not None else ()


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text is not valid Unicode: character {error.start} is the lone surrogate "
            f"U+{ord(text[error.start]):04X}; send a whole surrogate pair or leave it out"
        ) from None


def _join(token_bytes: Sequence[bytes], token_ids: Sequence[int]) -> bytes:
    size = len(token_bytes)
    return b"".join([token_bytes[id] for id in token_ids if 0 <= id < size])
