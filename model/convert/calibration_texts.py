"""A file of texts -> the token ids that calibrate a quantization.

Each line is a JSON object with one of these; other keys are ignored:
- "text", or "prompt" as requests have it: a text, which is tokenized as a prompt is, or of "prompt" its token ids;
- "messages": a conversation as in OpenAI's API, in the checkpoint's chat format.  It may end with an answer.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persimmon.model.chat import Chat, chat_format
from persimmon.model.chat_format import ChatFormatError, Turn
from persimmon.model.chat_template_files import ChatTemplateError
from persimmon.model.config import PersimmonConfig
from persimmon.model.errors import CheckpointError
from persimmon.model.quantization.calibration import MAX_STEP
from persimmon.model.tokenizer import Tokenizer
from persimmon.model.vocabulary import VocabularyMap

MAX_TOKENS = 1 << 16
"""Texts beyond these are not read.  The 8B model's hidden states of them take 1 GiB."""


def read_calibration_texts(path: Path, files: Mapping[str, bytes], config: PersimmonConfig) -> list[list[int]]:
    """The rows of the embedding of each text, at most MAX_TOKENS in all; long texts are cut into several.

    Args:
        path: the file.
        files: of the checkpoint that is written: its tokenizer and config.json.
        config: of its network.

    Raises:
        CheckpointError: the file cannot be read or has no texts, a line is not a text, or the tokenizer's files cannot
            be used.
    """
    try:
        # Not splitlines: JSON strings may hold other line separators.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    longest = min(MAX_STEP, config.max_position_embeddings)
    texts: list[list[int]] = []
    left = MAX_TOKENS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in files.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(content)
        for token_ids in _token_ids(path, lines, folder, config):
            for start in range(0, len(token_ids), longest):
                piece = token_ids[start : min(start + longest, start + left)]
                if len(piece) > 1:  # one token says nothing of attention
                    texts.append(piece)
                    left -= len(piece)
            if left < 2:
                break
    if not texts:
        raise CheckpointError(f"{path} has no texts of at least two tokens; expected {_EXPECTED} on a line")
    return texts


def _token_ids(path: Path, lines: list[str], folder: Path, config: PersimmonConfig) -> Iterator[list[int]]:
    reader = _Reader.of_folder(folder, config)
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield reader.rows(line)
            except ValueError as error:
                raise CheckpointError(f"{path}, line {number}: {error}") from None


_EXPECTED = 'an object like {"text": "…"}, {"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}'


@dataclass(frozen=True)
class _Reader:
    """Tokenizes lines as the server does prompts.

    Attributes:
        tokenizer: the checkpoint's.
        chat: its chat format.
        vocabulary: its rows, where it has fewer than token ids.
        vocab_size: token ids.
    """

    tokenizer: Tokenizer
    chat: Chat
    vocabulary: VocabularyMap | None
    vocab_size: int

    @classmethod
    def of_folder(cls, folder: Path, config: PersimmonConfig) -> "_Reader":
        """Reads a checkpoint's files.

        Raises:
            CheckpointError: one cannot be used.
        """
        tokenizer, vocabulary = Tokenizer.from_folder(folder), VocabularyMap.from_folder(folder, config)
        vocab_size = (vocabulary.original(config) if vocabulary else config).vocab_size
        return cls(tokenizer, chat_format(folder, config, tokenizer, None), vocabulary, vocab_size)

    def rows(self, line: str) -> list[int]:
        """Rows of the embedding.

        Raises:
            ValueError: the line is not as it should be; the message says why.
        """
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        given = [key for key in ("text", "prompt", "messages") if isinstance(value, dict) and key in value]
        if len(given) != 1:
            raise ValueError(f"expected {_EXPECTED}")
        token_ids = self._conversation(value) if given == ["messages"] else self._text(given[0], value[given[0]])
        if self.vocabulary is None:
            return token_ids
        dropped = next((token_id for token_id in token_ids if not self.vocabulary.kept(token_id)), None)
        if dropped is not None:
            raise ValueError(f"it has the token id {dropped}, which is dropped")
        return self.vocabulary.to_rows(token_ids)

    def _text(self, key: str, value: Any) -> list[int]:
        if isinstance(value, str):
            return self.tokenizer.encode(value)
        if key == "text" or not isinstance(value, list) or not all(type(token_id) is int for token_id in value):
            raise ValueError(f'"{key}" is not a string{" or a list of token ids" if key == "prompt" else ""}')
        beyond = next((token_id for token_id in value if not 0 <= token_id < self.vocab_size), None)
        if beyond is not None:
            raise ValueError(f"the token id {beyond} does not exist; expected 0 to {self.vocab_size - 1:,}")
        return value

    def _conversation(self, value: Mapping[str, Any]) -> list[int]:
        turns, answer = _turns(value["messages"]), None
        if len(turns) > 1 and turns[-1].role == "assistant":
            *turns, last = turns
            answer = f" {last.content}" if self.chat.leading_space else last.content
        try:
            if self.chat.template is None:
                prompt = self.chat.of_turns(turns)
            else:
                prompt = self.chat.of_messages([{"role": turn.role, "content": turn.content} for turn in turns])
        except (ChatFormatError, ChatTemplateError) as error:
            raise ValueError(f"the chat format cannot hold the conversation: {error}") from None
        return (prompt if answer is None else prompt.followed_by(answer)).token_ids(self.tokenizer)


def _turns(messages: Any) -> Sequence[Turn]:
    """Messages whose contents are text, or parts of text."""
    turns = []
    for message in messages if isinstance(messages, list) else ():
        role, content = (message.get(key) for key in ("role", "content")) if isinstance(message, dict) else (None, None)
        if isinstance(content, list):
            texts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "\n".join(text for text in texts if isinstance(text, str)) if None not in texts else None
        if not isinstance(role, str) or not isinstance(content, str):
            break
        turns.append(Turn(role, content))
    else:
        if turns:
            return turns
    raise ValueError('"messages" is not a list of messages with a "role" and a "content" of text')
