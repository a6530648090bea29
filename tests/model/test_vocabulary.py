"""VocabularyMap: ids to rows and back; a file that is wrong is one line that names it."""

import json
from pathlib import Path
from typing import Any

import pytest

from persimmon.model.config import PersimmonConfig
from persimmon.model.errors import CheckpointError
from persimmon.model.vocabulary import VOCABULARY_FILE, VocabularyMap

MAP = VocabularyMap(20, [range(3), range(10, 12), range(19, 20)])
KEPT = [0, 1, 2, 10, 11, 19]


def config(**values: Any) -> PersimmonConfig:
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return PersimmonConfig(**sizes, max_position_embeddings=8, **values)


def test_rows_are_numbered_in_the_order_of_their_ids() -> None:
    assert MAP.to_rows(KEPT) == [0, 1, 2, 3, 4, 5]
    assert MAP.to_ids([0, 1, 2, 3, 4, 5]) == KEPT
    assert list(MAP.ids) == KEPT


def test_order_and_repetitions_of_ids_stay() -> None:
    assert MAP.to_rows([19, 2, 19]) == [5, 2, 5]
    assert MAP.to_ids([5, 2, 5]) == [19, 2, 19]
    assert MAP.to_rows([]) == []


def test_only_ids_that_have_rows_are_kept() -> None:
    assert [token_id for token_id in range(-25, 25) if MAP.kept(token_id)] == KEPT


@pytest.mark.parametrize("token_id", [3, 9, 12, 18, 20, -1, 2**70])
def test_an_id_without_a_row_is_named(token_id: int) -> None:
    with pytest.raises(ValueError, match=rf"token id {token_id} has no row"):
        MAP.to_rows([0, token_id])


def test_a_configuration_of_ids_becomes_one_of_rows_and_comes_back() -> None:
    whole = config(vocab_size=20, bos_token_id=10, eos_token_ids=(19, 11), pad_token_id=11)
    rows = MAP.trimmed(whole)
    assert rows == config(vocab_size=6, bos_token_id=3, eos_token_ids=(5, 4), pad_token_id=4)
    assert MAP.original(rows) == whole


def test_a_folder_without_the_file_has_no_map(tmp_path: Path) -> None:
    assert VocabularyMap.from_folder(tmp_path, config(vocab_size=20)) is None


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (tmp_path / VOCABULARY_FILE).write_text(json.dumps(MAP.content))
    read = VocabularyMap.from_folder(tmp_path, config(vocab_size=6))
    assert read is not None
    assert (read.vocab_size, read.kept_ids, list(read.ids)) == (20, MAP.kept_ids, KEPT)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"kept_ids": [[0, 6]]}, "vocab_size is missing"),
        ({"vocab_size": 2**40, "kept_ids": [[0, 6]]}, "vocab_size is 1099511627776; expected at most"),
        ({"vocab_size": 20}, "kept_ids is None; expected ranges"),
        ({"vocab_size": 20, "kept_ids": {"0": 6}}, "expected ranges"),
        ({"vocab_size": 20, "kept_ids": [[0, 6, 1]]}, "expected ranges"),
        ({"vocab_size": 20, "kept_ids": [[0, 6.0]]}, "expected ranges"),
        ({"vocab_size": 20, "kept_ids": [[False, 6]]}, "expected ranges"),
        ({"vocab_size": 20, "kept_ids": []}, "expected ranges"),
        ({"vocab_size": 20, "kept_ids": [[0, 0], [1, 7]]}, "expected ranges"),
        ({"vocab_size": 20, "kept_ids": [[0, 4], [3, 5]]}, "expected ranges"),
        ({"vocab_size": 20, "kept_ids": [[4, 7], [0, 3]]}, "expected ranges"),
        ({"vocab_size": 20, "kept_ids": [[-3, 3]]}, "expected ranges"),
        ({"vocab_size": 20, "kept_ids": [[15, 21]]}, "expected ranges"),
        ({"vocab_size": 20, "kept_ids": [[0, 2**60]]}, "expected ranges"),
        ({"vocab_size": 20, "kept_ids": [[0, 7]]}, "6 ids, as many as vocab_size in config.json, where they are 7"),
        ([], "holds a JSON list"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(content: Any, named: str, tmp_path: Path) -> None:
    (tmp_path / VOCABULARY_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=named) as raised:
        VocabularyMap.from_folder(tmp_path, config(vocab_size=6))
    assert str(tmp_path / VOCABULARY_FILE) in str(raised.value)
    assert "\n" not in str(raised.value)
