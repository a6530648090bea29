"""A file of texts -> the token ids that calibrate a quantization.

Each line is a JSON object with "text", a document, or "messages", a conversation in the form of OpenAI's API; other
keys are ignored.  A document is tokenized as a prompt is, a conversation rendered by the checkpoint's chat template.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from persimmon.model.chat import chat_format
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
        files: of the checkpoint that is written: its tokenizer, chat template and config.json.
        config: of its network.

    Raises:
        CheckpointError: the file cannot be read or has no texts, a line is not a text, or the tokenizer's files cannot
            be used.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
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
        raise CheckpointError(f'{path} has no texts of at least two tokens; expected lines like {{"text": "…"}}')
    return texts


def _token_ids(path: Path, lines: list[str], folder: Path, config: PersimmonConfig) -> Iterator[list[int]]:
    tokenizer = Tokenizer.from_folder(folder)
    vocabulary = VocabularyMap.from_folder(folder, config)
    chat = chat_format(folder, config, tokenizer, None)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        text = _object(path, number, line)
        try:
            if "text" in text:
                token_ids = tokenizer.encode(text["text"])
            else:
                token_ids = chat.of_messages(text["messages"]).token_ids(tokenizer)
        except ChatTemplateError as error:
            raise CheckpointError(f"{path}, line {number}: the chat template cannot render it: {error}") from error
        if vocabulary is not None:
            dropped = [token_id for token_id in token_ids if not vocabulary.kept(token_id)]
            if dropped:
                raise CheckpointError(f"{path}, line {number} has the token id {dropped[0]}, which is dropped")
            token_ids = vocabulary.to_rows(token_ids)
        yield token_ids


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    expected = 'an object with "text", a string, or "messages", a list of objects with "role" and "content"'
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict) or ("text" in value) == ("messages" in value):
        raise CheckpointError(f"{path}, line {number}: expected {expected}")
    messages = value.get("messages", [])
    if (
        not isinstance(value.get("text", ""), str)
        or not isinstance(messages, list)
        or not all(map(_is_message, messages))
    ):
        raise CheckpointError(f"{path}, line {number}: expected {expected}")
    return value


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
