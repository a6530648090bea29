"""A file of texts -> the token ids that calibrate a quantization.

Each line is a JSON object with "text", which is tokenized as a prompt is; other keys are ignored.  A conversation is
given as the text that a chat template makes of it.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

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
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        token_ids = tokenizer.encode(_text(path, number, line))
        if vocabulary is not None:
            dropped = [token_id for token_id in token_ids if not vocabulary.kept(token_id)]
            if dropped:
                raise CheckpointError(f"{path}, line {number} has the token id {dropped[0]}, which is dropped")
            token_ids = vocabulary.to_rows(token_ids)
        yield token_ids


def _text(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise CheckpointError(f'{path}, line {number}: expected an object like {{"text": "…"}}')
    return str(value["text"])
