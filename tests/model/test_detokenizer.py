"""Decoding: a stream's deltas add up to the whole text, for any tokens in any portions."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from persimmon import model
from persimmon.model.tokenizer import IncrementalDetokenizer, Tokenizer

DEMO = Path(model.__file__).parent / "demo"
TOKENIZER = Tokenizer.from_folder(DEMO)
SENTENCEPIECE = SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))
UNKNOWN, END_OF_TEXT, FIRST_BYTE, FIRST_WORD = 0, 1, 2, 258


def byte_tokens(content: bytes) -> list[int]:
    return [FIRST_BYTE + byte for byte in content]


def broken_utf8() -> st.SearchStrategy[bytes]:
    """Text in UTF-8 with a piece cut out of it, so that characters are torn at any place."""
    texts = st.text(st.sampled_from("aé€日😀🏽\u0301\u200d\ufffd")).map(str.encode)
    return st.builds(
        lambda text, start, length: text[:start] + text[start + length :], texts, *[st.integers(0, 12)] * 2
    )


WORDS = st.integers(FIRST_WORD, TOKENIZER.vocab_size - 1)
PORTIONS = (
    st.binary(max_size=6).map(byte_tokens)
    | broken_utf8().map(byte_tokens)
    | st.text(max_size=6).map(lambda text: TOKENIZER.encode(text, add_bos=False))
    | st.lists(WORDS, max_size=4)
    | st.sampled_from([[UNKNOWN], [END_OF_TEXT], [TOKENIZER.vocab_size], [2**31]])
)
TOKENS = st.lists(PORTIONS, max_size=12).map(lambda portions: [id for portion in portions for id in portion])


@st.composite
def split_tokens(draw: st.DrawFn) -> list[list[int]]:
    ids = draw(TOKENS)
    cuts = draw(st.lists(st.integers(0, len(ids)), max_size=len(ids)).map(sorted))
    return [ids[start:end] for start, end in pairwise([0, *cuts, len(ids)])]


def stream(pushes: list[list[int]]) -> list[str]:
    detokenizer = TOKENIZER.detokenizer()
    return [*(detokenizer.push(ids) for ids in pushes), detokenizer.finish()]


@given(pushes=split_tokens())
@settings(deadline=None, max_examples=500)
def test_deltas_add_up_to_the_whole_text(pushes: list[list[int]]) -> None:
    assert "".join(stream(pushes)) == TOKENIZER.decode([id for ids in pushes for id in ids])


@given(ids=TOKENS, more=TOKENS)
@settings(deadline=None, max_examples=500)
def test_text_given_out_is_certain_whatever_comes_next(ids: list[int], more: list[int]) -> None:
    given_out = TOKENIZER.detokenizer().push(ids)
    assert TOKENIZER.decode(ids + more).startswith(given_out)


@given(text=st.text(), cuts=st.data())
@settings(deadline=None)
def test_no_replacement_character_appears_that_the_text_lacks(text: str, cuts: st.DataObject) -> None:
    assume("\ufffd" not in text)
    ids = byte_tokens(text.encode())
    cut = cuts.draw(st.integers(0, len(ids)))
    for pushes in ([ids[:cut], ids[cut:]], [[id] for id in ids]):
        deltas = stream(pushes)
        assert "\ufffd" not in "".join(deltas)
        assert deltas[-1] == ""


@given(text=st.text(min_size=1))
@settings(deadline=None)
def test_a_character_is_given_out_with_its_last_byte(text: str) -> None:
    detokenizer = TOKENIZER.detokenizer()
    for character in text:
        *first, last = byte_tokens(character.encode())
        assert detokenizer.push(first) == ""
        assert detokenizer.push([last]) == character


def test_a_character_that_never_ends_becomes_one_replacement_character_at_the_end() -> None:
    euro = byte_tokens("€".encode())
    assert stream([euro[:2]]) == ["", "\ufffd"]
    assert stream([euro[:2], [FIRST_WORD]])[1:] == ["\ufffd" + TOKENIZER.decode([FIRST_WORD]), ""]


@given(content=st.binary(max_size=30))
@settings(deadline=None)
def test_bytes_decode_as_python_replaces_what_is_no_utf8(content: bytes) -> None:
    assert TOKENIZER.decode(byte_tokens(content)) == content.decode(errors="replace")


@given(ids=st.lists(WORDS | st.sampled_from([UNKNOWN, END_OF_TEXT])), text=st.text())
@settings(deadline=None, max_examples=300)
def test_decoding_from_the_start_is_sentencepieces_decoding(ids: list[int], text: str) -> None:
    ids = ids + TOKENIZER.encode(text, add_bos=False)
    assert TOKENIZER.decode(ids, from_start=True) == SENTENCEPIECE.decode(ids)


def test_a_continuation_keeps_its_leading_space() -> None:
    prompt, answer = TOKENIZER.encode("human: hello\n\nadept:"), TOKENIZER.encode("good day", add_bos=False)
    assert TOKENIZER.decode(answer) == " good day"
    whole = TOKENIZER.decode(prompt, from_start=True) + TOKENIZER.decode(answer)
    assert whole == TOKENIZER.decode(prompt + answer, from_start=True) == "human: hello\n\nadept: good day"


def test_only_the_space_that_encoding_put_there_is_taken_off() -> None:
    for text in ("  two", " one", "none", "\n newline"):
        assert TOKENIZER.decode(TOKENIZER.encode(text), from_start=True) == text
    assert TOKENIZER.decode(byte_tokens(b" byte"), from_start=True) == " byte"


@pytest.mark.parametrize("nothing", [END_OF_TEXT, TOKENIZER.vocab_size, 262_143, 2**40, -1])
def test_control_tokens_and_ids_outside_the_vocabulary_add_nothing(nothing: int) -> None:
    word = TOKENIZER.encode("word", add_bos=False)
    assert TOKENIZER.decode([nothing, *word, nothing], from_start=True) == "word"
    assert stream([[nothing], word, [nothing]]) == ["", " word", "", ""]


def test_each_token_is_looked_at_once_however_long_the_stream() -> None:
    class CountedTable(list[bytes]):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            self.reads += 1
            return super().__getitem__(index)

    table = CountedTable([b" a", "é".encode()[:1], "é".encode()[1:]])
    detokenizer = IncrementalDetokenizer(table)
    text = "".join(detokenizer.push([id]) for _ in range(1000) for id in (0, 1, 2))
    assert text == " aé" * 1000
    assert table.reads == 3000
