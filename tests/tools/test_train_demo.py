"""The programs that made the demo checkpoint."""

import json
import shutil

import pytest

from tests.model.checkpoints import DEMO
from tools.demo_tokenizer_json import write
from tools.train_demo import WORDNET, Dialogues, Sense, read_senses

# As WordNet's files have it: offset, file, part, words in hexadecimal, pointers, and the gloss.
NOUNS = """\
  1 Lines that begin with two spaces are the licence.
00000001 03 n 02 persimmon 0 date_plum 0 001 @ 00000002 n 0000 | orange fruit (ripe); like a plum; "a ripe persimmon"
00000002 03 n 01 fruit 0 000 | the ripened body of a seed plant
"""
NOUN_INDEX = """\
  1 Lines that begin with two spaces are the licence.
persimmon n 1 1 @ 1 0 00000001
date_plum n 1 0 1 0 00000001
fruit n 1 0 1 0 00000002
"""


@pytest.fixture
def wordnet(tmp_path):
    for part in ("verb", "adj", "adv"):
        (tmp_path / f"data.{part}").touch()
        (tmp_path / f"index.{part}").touch()
    (tmp_path / "data.noun").write_text(NOUNS)
    (tmp_path / "index.noun").write_text(NOUN_INDEX)
    (tmp_path / "cntlist.rev").write_text("fruit%1:03:00:: 1 7\n")
    return tmp_path


def test_senses_are_read_with_their_examples_and_kinds(wordnet):
    senses, offsets = read_senses(wordnet)
    assert offsets["date plum", "noun"] == ["00000001"]
    assert senses["noun", "00000001"] == Sense(
        words=("persimmon", "date plum"),
        definition="orange fruit ; like a plum",
        examples=("a ripe persimmon",),
        kind="00000002",
    )


def test_dialogues_are_in_the_chat_format_and_repeat_with_their_seed(wordnet):
    dialogues = Dialogues(wordnet, words=10)
    assert len(dialogues) == 2  # a word that demo users would try, and one that is counted
    sampled = [dialogues.sample() for _ in range(200)]
    assert all(text.startswith("human: ") and "\n\nadept: " in text for text in sampled)
    assert any('"Persimmon" is a noun. It means orange fruit' in text for text in sampled)
    assert any('It is a kind of "fruit".' in text for text in sampled)
    again = Dialogues(wordnet, words=10)
    assert [again.sample() for _ in range(200)] == sampled


@pytest.mark.skipif(not WORDNET.is_dir(), reason="WordNet is not installed")
def test_the_demo_knows_several_thousand_words():
    assert len(Dialogues(WORDNET, words=5000)) > 4000


def test_the_demos_tokenizer_files_are_what_the_program_writes(tmp_path):
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    write(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((DEMO / name).read_text())
