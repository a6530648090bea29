"""VocabularyMap: token ids, as the tokenizer and the API have them <-> the rows of an embedding without some of them.

Knows the file in which a trimmed checkpoint keeps the map.  Knows nothing of tensors or of why an id was dropped, and
imports no torch: API workers use it too.
"""

import itertools
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from persimmon.model.config import PersimmonConfig
from persimmon.model.json_object import JsonObject

VOCABULARY_FILE = "vocabulary_map.json"

_NO_ROW = -1
_MAX_VOCAB_SIZE = 1 << 24  # a larger one is a mistake in the file, found before a table is made for it


class VocabularyMap:
    """Which token ids have a row in the embedding and in lm_head, and which row.

    Rows are in the order of their ids.  So the lowest of several ids has the lowest row, and what goes by that order,
    ties between logits for one, goes as it did before.

    Args:
        vocab_size: ids of the whole vocabulary, dropped ones included.
        kept: ranges of the ids that have rows, in ascending order.

    Raises:
        ValueError: the ranges are empty, out of order or beyond the vocabulary.
    """

    def __init__(self, vocab_size: int, kept: Sequence[range]) -> None:
        bounds = [0, *(bound for ids in kept for bound in (ids.start, ids.stop)), vocab_size]
        if not kept or not all(kept) or bounds != sorted(bounds):
            raise ValueError(f"{list(kept)} are not ascending ranges of ids below {vocab_size}")
        self.vocab_size = vocab_size
        self.kept_ids = tuple(kept)
        self.ids: Sequence[int] = array("i", itertools.chain.from_iterable(kept))
        """The id of each row."""
        self._rows = array("i", [_NO_ROW]) * vocab_size
        for row, token_id in enumerate(self.ids):
            self._rows[token_id] = row

    @classmethod
    def from_folder(cls, folder: Path, config: PersimmonConfig) -> "VocabularyMap | None":
        """The map of a trimmed checkpoint; None of one whose ids are its rows.

        Args:
            folder: the checkpoint.
            config: its network.

        Raises:
            CheckpointError: the file cannot be read, has a wrong value, or is another network's.
        """
        file = JsonObject.read(folder / VOCABULARY_FILE)
        if file is None:
            return None
        vocab_size = file.positive_integer("vocab_size")
        if vocab_size > _MAX_VOCAB_SIZE:
            raise file.error("vocab_size", f"at most {_MAX_VOCAB_SIZE}")
        kept: Any = file.values.get("kept_ids")
        try:
            vocabulary = cls(vocab_size, [range(*pair) for pair in kept] if _are_pairs(kept) else [])
        except ValueError:
            raise file.error(
                "kept_ids", f"ranges of ids below {vocab_size}, each [first, one after the last], in ascending order"
            ) from None
        if len(vocabulary.ids) != config.vocab_size:
            raise file.error(
                "kept_ids",
                f"{config.vocab_size} ids, as many as vocab_size in config.json, where they are {len(vocabulary.ids)}",
            )
        return vocabulary

    @property
    def content(self) -> dict[str, Any]:
        """What VOCABULARY_FILE holds.  Ranges are [first, one after the last], as offsets in safetensors are."""
        return {"vocab_size": self.vocab_size, "kept_ids": [[ids.start, ids.stop] for ids in self.kept_ids]}

    def kept(self, token_id: int) -> bool:
        """Whether an id has a row.  One outside the vocabulary has none."""
        return 0 <= token_id < self.vocab_size and self._rows[token_id] != _NO_ROW

    def to_rows(self, token_ids: Sequence[int]) -> list[int]:
        """The rows of some ids, in their order.

        Raises:
            ValueError: an id has none; check with `kept` first.
        """
        size = self.vocab_size
        rows = [self._rows[token_id] if 0 <= token_id < size else _NO_ROW for token_id in token_ids]
        if _NO_ROW in rows:
            raise ValueError(f"token id {token_ids[rows.index(_NO_ROW)]} has no row in this trimmed vocabulary")
        return rows

    def to_ids(self, rows: Sequence[int]) -> list[int]:
        """The ids of some rows, in their order.

        Args:
            rows: each at least 0 and below the number of rows.
        """
        return [self.ids[row] for row in rows]

    def trimmed(self, config: PersimmonConfig) -> PersimmonConfig:
        """A network's configuration when only the rows are left: its token ids are rows then.

        Args:
            config: of the whole vocabulary, with token ids that are kept.
        """
        return _renumbered(config, len(self.ids), self.to_rows)

    def original(self, config: PersimmonConfig) -> PersimmonConfig:
        """The reverse of `trimmed`: a trimmed checkpoint's configuration in terms of ids.

        Args:
            config: as `PersimmonConfig.from_folder` reads it, with rows for token ids.
        """
        return _renumbered(config, self.vocab_size, self.to_ids)


def _renumbered(
    config: PersimmonConfig, vocab_size: int, renumber: Callable[[Sequence[int]], list[int]]
) -> PersimmonConfig:
    def one(token_id: int | None) -> int | None:
        return None if token_id is None else renumber([token_id])[0]

    vision = config.vision
    if vision is not None:
        vision = replace(vision, image_token_id=renumber([vision.image_token_id])[0])
    return replace(
        config,
        vocab_size=vocab_size,
        vision=vision,
        bos_token_id=one(config.bos_token_id),
        eos_token_ids=tuple(renumber(config.eos_token_ids)),
        pad_token_id=one(config.pad_token_id),
    )


def _are_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(bound) is int for bound in pair) for pair in value
    )
