"""Ids are SentencePiece's own, text is never a control token, a bad tokenizer file is one clear line."""

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from persimmon import model
from persimmon.model.errors import CheckpointError
from persimmon.model.tokenizer import END_OF_TEXT, Tokenizer

DEMO = Path(model.__file__).parent / "demo"
DEMO_UNKNOWN, DEMO_BOS = 0, 1
PIECE = ModelProto.SentencePiece

HARD_STRINGS = [
    "",
    " ",
    "     ",
    " leading",
    "trailing ",
    "  both   and    runs  between  ",
    "Hello, world! What does 'example' mean?",
    "human: What does run mean?\n\nadept: to move fast\n\nhuman: And?\n\nadept:",
    "\n",
    "\n\n\n\n",
    "\r\n line ends \r\n\r\n and \r alone",
    "\t",
    "a\tb\t\tc \t d",
    "\N{NO-BREAK SPACE}\N{EM SPACE}\N{IDEOGRAPHIC SPACE}\N{LINE SEPARATOR}",
    "".join(map(chr, range(32))) + "\x7f\x80\x9f",
    "nul\0in the middle, and at the end\0",
    "zero\N{ZERO WIDTH SPACE}width\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}\N{WORD JOINER}",
    "\N{ZERO WIDTH NO-BREAK SPACE}byte order mark, \N{SOFT HYPHEN} soft hyphen",
    "😀 😃😄 👍🏽 ❤️ ☎︎",
    "👨‍👩‍👧‍👦 👩🏾‍🚀 🏳️‍🌈 🏴‍☠️",
    "🇫🇷🇯🇵🇺🇳 🏴󠁧󠁢󠁳󠁣󠁴󠁿 1️⃣",
    "日本語の文章。漢字とカナ、ひらがな。",
    "中文没有空格,标点也不同。𠮷野家",
    "한국어 문장과 띄어쓰기",
    "\u1112\u1161\u11ab\u1100\u1173\u11af, jamo",
    "مرحبا بالعالم، كيف الحال؟ ١٢٣",
    "שלום עולם \N{RIGHT-TO-LEFT OVERRIDE}turned\N{POP DIRECTIONAL FORMATTING} נִקּוּד",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "नमस्ते दुनिया क्ष",
    "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m",
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m",
    "Z̸̢̛͎a̵l̷g̶o̸ t̴e̷x̶t̵" + "\u0301" * 50,
    "ﬁ ﬀ Ⅷ ½ ㎏ ｆｕｌｌ ｗｉｄｔｈ",
    "math: ∀x∈ℝ ∃y: x²≠√y ⇒ ∑ᵢ𝒳ᵢ",
    "\ufffd \ufffe \uffff \U0010ffff private \ue000",
    "def f(x: int) -> str:\n    return f'{x!r}'  # comment\n\n\tif a[0]!=b&&c<=d: pass",
    '{"json": [1, 2.5e-10, null], "path": "C:\\\\temp\\\\", "url": "https://a.b/c?d=e&f=%20"}',
    "<html><body class='x'>&nbsp;</body></html>",
    "1234567890 3.14159 1,000,000 0x1F 1e-5",
    "Donaudampfschifffahrtsgesellschaftskapitän" * 20,
    "a" * 1000,
    "ab" * 500,
    "é" * 300,
    "<s> and </s> and <pad>",
    "[INST] <|im_start|>system <|endoftext|>",
]

# Spelled control tokens and byte pieces: text to SentencePiece, tokens to a tokenizer.json.
CONTROL_STRINGS = [
    END_OF_TEXT,
    f"{END_OF_TEXT}{END_OF_TEXT}",
    f"say {END_OF_TEXT} and go on",
    f" {END_OF_TEXT} ",
    "<unk>",
    "an <unk> in the middle",
]
BYTE_STRINGS = ["<0x0A>", "<0xE2><0x82><0xAC> is not a euro sign"]

# SentencePiece's mark for a space, as text.
SPACE_MARKS = ["▁", "▁▁", "a▁b", " ▁ ", "▁the end▁"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


@pytest.fixture(scope="module")
def sentencepiece() -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))


@pytest.fixture(scope="module")
def transformers_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO, local_files_only=True)


def demo_model() -> Any:
    proto = ModelProto()
    proto.ParseFromString((DEMO / "tokenizer.model").read_bytes())
    return proto


def with_types(types: dict[str, int], added: dict[str, int] | None = None) -> Any:
    """The demo's model with other types for some pieces, and further pieces at its end."""
    proto = demo_model()
    for piece in proto.pieces:
        piece.type = types.get(piece.piece, piece.type)
    for text, type in (added or {}).items():
        proto.pieces.add(piece=text, score=0.0, type=type)
    return proto


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint folder's tokenizer files."""

    def write(proto: Any = None, settings: Any = None, name: str = "tokenizer.model") -> Path:
        (tmp_path / name).write_bytes((proto or demo_model()).SerializeToString())
        if settings is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return tmp_path

    return write


@pytest.mark.parametrize("text", [*HARD_STRINGS, *CONTROL_STRINGS, *BYTE_STRINGS, *SPACE_MARKS])
def test_ids_are_sentencepieces_own(tokenizer: Tokenizer, sentencepiece: SentencePieceProcessor, text: str) -> None:
    assert tokenizer.encode(text, add_bos=False) == sentencepiece.encode(text)


@pytest.mark.parametrize("text", [*HARD_STRINGS, *SPACE_MARKS])
def test_ids_are_those_of_tokenizer_json_in_transformers(
    tokenizer: Tokenizer, transformers_tokenizer: Any, text: str
) -> None:
    assert tokenizer.encode(text) == transformers_tokenizer.encode(text)


@pytest.mark.parametrize("text", [*HARD_STRINGS, *CONTROL_STRINGS, *BYTE_STRINGS])
def test_hard_strings_come_back_as_they_were(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), from_start=True) == text


@given(text=st.text())
@settings(deadline=None, max_examples=300)
@example(text=" " * 40)
@example(text="▁ ▁")
def test_any_text_has_sentencepieces_ids_and_comes_back(
    tokenizer: Tokenizer, sentencepiece: SentencePieceProcessor, text: str
) -> None:
    ids = tokenizer.encode(text, add_bos=False)
    assert ids == sentencepiece.encode(text)
    assert tokenizer.decode(ids, from_start=True) == sentencepiece.decode(ids) == text.replace("▁", " ")


@given(text=st.text(st.characters(codec="utf-8") | st.sampled_from("etaoin shrdlu\n'")))
@settings(deadline=None, max_examples=300, derandomize=True)
def test_any_text_has_the_ids_of_tokenizer_json(tokenizer: Tokenizer, transformers_tokenizer: Any, text: str) -> None:
    assume(not any(token in text for token in (END_OF_TEXT, "<unk>", "<0x")))
    assert tokenizer.encode(text) == transformers_tokenizer.encode(text)


@pytest.mark.parametrize("text", [*CONTROL_STRINGS, *BYTE_STRINGS])
def test_tokens_spelled_in_a_text_are_text_here_and_tokens_in_transformers(
    tokenizer: Tokenizer, transformers_tokenizer: Any, text: str
) -> None:
    tokens = {
        DEMO_UNKNOWN,
        DEMO_BOS,
        tokenizer.encode("\n")[-1],
        *tokenizer.encode("€")[-3:],
    }
    assert not tokens & set(tokenizer.encode(text, add_bos=False))
    assert tokens & set(transformers_tokenizer.encode(text, add_special_tokens=False))


@given(text=st.lists(st.sampled_from([*CONTROL_STRINGS, "|", "ENDOFTEXT", " ", "x", "é"])).map("".join))
@settings(deadline=None)
def test_no_text_holds_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    assert not {DEMO_UNKNOWN, DEMO_BOS} & set(tokenizer.encode(text, add_bos=False))


@pytest.mark.parametrize("type", [PIECE.USER_DEFINED, PIECE.NORMAL])
@pytest.mark.parametrize("config", [None, {"bos_token": END_OF_TEXT, "eos_token": None}])
def test_end_of_text_is_control_whatever_the_vocabulary_calls_it(
    checkpoint: Callable[..., Path], tokenizer: Tokenizer, type: int, config: Any
) -> None:
    proto = with_types({END_OF_TEXT: type})
    text = f"say {END_OF_TEXT} and {END_OF_TEXT}"
    raw = SentencePieceProcessor(model_proto=proto.SerializeToString())
    assert DEMO_BOS in raw.encode(text)  # so the vocabulary is one that needs care

    careful = Tokenizer.from_folder(checkpoint(proto, config))
    for given_text in [text, *CONTROL_STRINGS, *HARD_STRINGS]:
        ids = careful.encode(given_text)
        assert ids == tokenizer.encode(given_text, add_bos=False)
        assert DEMO_BOS not in ids
    assert careful.bos_token_id == DEMO_BOS
    assert careful.decode([DEMO_BOS]) == ""


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": "|BEGIN|"},
        {"eos_token": {"__type": "AddedToken", "content": "|BEGIN|"}},
        {"pad_token": "|BEGIN|"},
        {"additional_special_tokens": ["x", {"content": "|BEGIN|"}]},
        {"extra_special_tokens": {"begin_token": "|BEGIN|"}},
        {"added_tokens_decoder": {"4096": {"content": "|BEGIN|", "special": True}}},
    ],
)
def test_special_tokens_of_tokenizer_config_are_never_found_in_a_text(
    checkpoint: Callable[..., Path], config: Any
) -> None:
    proto = with_types({}, added={"|BEGIN|": PIECE.USER_DEFINED})
    assert 4096 in SentencePieceProcessor(model_proto=proto.SerializeToString()).encode("a |BEGIN| b")
    tokenizer = Tokenizer.from_folder(checkpoint(proto, config))
    assert 4096 not in tokenizer.encode("a |BEGIN| b")
    assert tokenizer.decode([4096]) == ""


@pytest.mark.parametrize(
    "config",
    [None, {}, {"added_tokens_decoder": {"4096": {"content": "|BEGIN|", "special": False}}}],
)
def test_user_defined_pieces_that_are_text_stay_text(checkpoint: Callable[..., Path], config: Any) -> None:
    proto = with_types({}, added={"|BEGIN|": PIECE.USER_DEFINED, "\n\n": PIECE.USER_DEFINED})
    tokenizer = Tokenizer.from_folder(checkpoint(proto, config))
    ids = tokenizer.encode("a |BEGIN|\n\nb")
    assert {4096, 4097} <= set(ids)
    assert tokenizer.decode(ids, from_start=True) == "a |BEGIN|\n\nb"


def test_a_word_used_as_padding_token_stays_a_word(checkpoint: Callable[..., Path], tokenizer: Tokenizer) -> None:
    word = "▁the"
    config = {"pad_token": word, "added_tokens_decoder": {"9": {"content": word, "special": True}}}
    ids = Tokenizer.from_folder(checkpoint(settings=config)).encode("the end of the day")
    assert ids == tokenizer.encode("the end of the day", add_bos=False)


def test_characters_outside_a_vocabulary_without_bytes_are_unknown(checkpoint: Callable[..., Path]) -> None:
    proto = demo_model()
    del proto.pieces[2:258]  # the byte pieces
    proto.trainer_spec.byte_fallback = False
    tokenizer = Tokenizer.from_folder(checkpoint(proto))
    ids = tokenizer.encode("the 日 end")
    assert DEMO_UNKNOWN in ids
    assert tokenizer.decode(ids, from_start=True) == SentencePieceProcessor(
        model_proto=proto.SerializeToString()
    ).decode(ids)


def test_lone_surrogates_are_refused_with_a_sentence(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"character 3 is the lone surrogate U\+D83D"):
        tokenizer.encode("abc\ud83d and more")


def test_bos_comes_before_the_text_where_tokenizer_config_says_so(
    checkpoint: Callable[..., Path], tokenizer: Tokenizer
) -> None:
    assert tokenizer.add_bos
    assert tokenizer.encode("hello") == [DEMO_BOS, *tokenizer.encode("hello", add_bos=False)]
    assert tokenizer.encode("") == [DEMO_BOS]


@pytest.mark.parametrize(
    ("config", "add_bos"),
    [
        (None, False),
        ({}, False),
        ({"add_bos_token": None}, False),
        ({"add_bos_token": False, "bos_token": END_OF_TEXT}, False),
        ({"add_bos_token": True, "bos_token": END_OF_TEXT}, True),
        ({"add_bos_token": True, "bos_token": {"content": END_OF_TEXT, "lstrip": False}}, True),
        ({"add_bos_token": True, "bos_token": None}, True),
        ({"add_bos_token": True}, True),
    ],
)
def test_bos_follows_tokenizer_config_and_yields_to_what_is_asked(
    checkpoint: Callable[..., Path], config: Any, add_bos: bool
) -> None:
    folder = checkpoint(settings=config)
    by_file = Tokenizer.from_folder(folder)
    assert (by_file.add_bos, by_file.bos_token_id) == (add_bos, DEMO_BOS)
    assert (by_file.encode("x")[0] == DEMO_BOS) is add_bos
    for asked in (True, False):
        assert (Tokenizer.from_folder(folder, add_bos=asked).encode("x")[0] == DEMO_BOS) is asked
        assert (by_file.encode("x", add_bos=asked)[0] == DEMO_BOS) is asked


def test_bos_that_is_not_in_the_vocabulary_is_an_error_only_where_it_is_wanted(
    checkpoint: Callable[..., Path],
) -> None:
    folder = checkpoint(settings={"add_bos_token": True, "bos_token": "<start>"})
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: .*'<start>', which is not in its vocabulary"):
        Tokenizer.from_folder(folder)
    without = Tokenizer.from_folder(folder, add_bos=False)
    assert without.bos_token_id is None
    with pytest.raises(ValueError, match="no beginning-of-sequence token"):
        without.encode("x", add_bos=True)


def test_adepts_own_file_name_is_found_and_tokenizer_model_wins(
    checkpoint: Callable[..., Path], tokenizer: Tokenizer
) -> None:
    folder = checkpoint(name="adept_vocab.model")
    assert Tokenizer.from_folder(folder, add_bos=True).encode("the end") == tokenizer.encode("the end")
    checkpoint(with_types({}, added={"extra": PIECE.NORMAL}), name="tokenizer.model")
    assert Tokenizer.from_folder(folder).vocab_size == tokenizer.vocab_size + 1


def test_a_folder_without_tokenizer_names_the_files_that_were_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"looked for tokenizer\.model, adept_vocab\.model and tokenizer\.json$"):
        Tokenizer.from_folder(tmp_path)


def damaged_files() -> dict[str, bytes]:
    whole = (DEMO / "tokenizer.model").read_bytes()
    without_normalizer = demo_model()
    without_normalizer.ClearField("normalizer_spec")
    contradictory = demo_model()  # byte pieces, and no byte fallback
    contradictory.trainer_spec.byte_fallback = False
    return {
        "empty": b"",
        "garbage": random.Random(0).randbytes(5000),
        "web page": b"<!DOCTYPE html><html><body>Not found</body></html>",
        "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5000000\n",
        "cut in the pieces": whole[: len(whole) // 2],
        "cut at the end": whole[:-3],
        "cut between parts": without_normalizer.SerializeToString(),
        "at odds with itself": contradictory.SerializeToString(),
    }


@pytest.mark.parametrize(("what", "content"), damaged_files().items())
def test_a_damaged_tokenizer_is_one_line_that_names_the_file(tmp_path: Path, what: str, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_folder(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'tokenizer.model'}: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "expected an object"),
        (b'{"add_bos_token": "yes"}', "add_bos_token is 'yes'; expected true or false"),
        (b'{"bos_token": 5}', "bos_token is 5; expected a string"),
    ],
)
def test_a_damaged_tokenizer_config_is_one_line_that_names_the_file(
    checkpoint: Callable[..., Path], content: bytes, complaint: str
) -> None:
    folder = checkpoint()
    (folder / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_folder(folder)
    message = str(caught.value)
    assert str(folder / "tokenizer_config.json") in message
    assert complaint in message
    assert "\n" not in message


def test_threads_share_a_tokenizer(tokenizer: Tokenizer) -> None:
    texts = [text * 20 for text in HARD_STRINGS]
    alone = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(4) as threads:
        for together in threads.map(lambda _: [tokenizer.encode(text) for text in texts], range(8)):
            assert together == alone
