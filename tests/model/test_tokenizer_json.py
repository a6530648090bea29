"""tokenizer.json: ids and text are Transformers', text is never a control token, a bad file is one clear line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from persimmon.model.errors import CheckpointError
from persimmon.model.tokenizer import END_OF_TEXT, Tokenizer
from tests.model.test_tokenizer import BYTE_STRINGS, CONTROL_STRINGS, DEMO, DEMO_BOS, HARD_STRINGS, SPACE_MARKS

SAVED_CONFIG = {
    "backend": "tokenizers",
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "tokenizer_class": "TokenizersBackend",
    "unk_token": "<unk>",
}
START, END, CITE = "<|im_start|>", "<|im_end|>", "[CITE]"
ADDED = {4096: (START, True), 4097: (END, True), 4098: (CITE, False)}
ADDED_TEXTS = [
    f"see {CITE}",
    f"{CITE}{CITE} both {CITE}.",
    f"x{CITE}y",
    f"{START}user\nHello{END}\n{START}assistant\n",
    f"a {START} b{END}c",
    f"{START}{CITE} [CITE[CITE]] <|im_start",
]

Folder = Callable[..., Path]


def described(content: str, special: bool = False, **flags: bool) -> dict[str, Any]:
    return {
        "content": content,
        "special": special,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
        **flags,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Writes a checkpoint folder's tokenizer files: the demo's, and what is given of others."""

    def write(
        config: Any = SAVED_CONFIG,
        change: Callable[[dict[str, Any]], object] | None = None,
        files: tuple[str, ...] = ("config.json", "tokenizer.json"),
        added: dict[str, int] | None = None,
    ) -> Path:
        for name in files:
            shutil.copy(DEMO / name, tmp_path)
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        if change is not None:
            content = json.loads((tmp_path / "tokenizer.json").read_text())
            change(content)
            (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        if added is not None:
            (tmp_path / "added_tokens.json").write_text(json.dumps(added))
        return tmp_path

    return write


def transformers_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def with_added_tokens(content: dict[str, Any]) -> None:
    content["added_tokens"] += [{"id": id, **described(text, special)} for id, (text, special) in ADDED.items()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Transformers saves it: without SentencePiece's file, and with no word of BOS in its config."""
    path = tmp_path_factory.mktemp("saved")
    shutil.copy(DEMO / "config.json", path)
    transformers_tokenizer(DEMO).save_pretrained(path)
    assert "add_bos_token" not in (path / "tokenizer_config.json").read_text()
    assert not (path / "tokenizer.model").exists()
    return path


@pytest.fixture(scope="module")
def tokenizer(saved: Path) -> Tokenizer:
    return Tokenizer.from_folder(saved)


@pytest.fixture(scope="module")
def reference(saved: Path) -> Any:
    return transformers_tokenizer(saved)


@pytest.mark.parametrize("text", [*HARD_STRINGS, *SPACE_MARKS])
def test_ids_and_text_are_transformers(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert ids[0] == DEMO_BOS
    assert tokenizer.decode(ids, from_start=True) == reference.decode(ids, skip_special_tokens=True)


@given(text=st.text(st.characters(codec="utf-8") | st.sampled_from("etaoin shrdlu\n'")))
@settings(deadline=None, max_examples=200)
def test_any_text_has_transformers_ids_and_comes_back(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    assume(not any(token in text for token in (END_OF_TEXT, "<unk>", "<0x")))
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids, from_start=True) == reference.decode(ids, skip_special_tokens=True)


@given(ids=st.lists(st.integers(258, 4095), max_size=30))
@settings(deadline=None, max_examples=200)
def test_a_stream_of_tokens_is_transformers_text_whole_or_in_pieces(
    tokenizer: Tokenizer, reference: Any, ids: list[int]
) -> None:
    detokenizer = tokenizer.detokenizer()
    text = "".join(detokenizer.push((token_id,)) for token_id in ids) + detokenizer.finish()
    prefix = " " if tokenizer.begins_with_prefix(ids) else ""
    assert text == tokenizer.decode(ids) == prefix + reference.decode(ids, skip_special_tokens=True)


def test_each_token_adds_the_same_bytes_as_with_sentencepiece(tokenizer: Tokenizer) -> None:
    plain = Tokenizer.from_folder(DEMO)
    assert tokenizer.text_bytes() == plain.text_bytes()
    assert [tokenizer.token_bytes(id) for id in range(1, 4096)] == [plain.token_bytes(id) for id in range(1, 4096)]
    assert tokenizer.pieces(range(4096)) == plain.pieces(range(4096))


def test_bytes_of_one_character_come_together(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x😀", add_bos=False)
    detokenizer = tokenizer.detokenizer()
    deltas = [detokenizer.push((token_id,)) for token_id in ids]
    assert deltas[-4:] == ["", "", "", "😀"]


@pytest.mark.parametrize("text", [*CONTROL_STRINGS, *BYTE_STRINGS])
def test_a_control_token_that_a_text_spells_stays_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_bos=False)
    assert not {0, DEMO_BOS} & set(ids)
    if text not in BYTE_STRINGS:
        assert tokenizer.decode(ids, from_start=True) == text


@given(text=st.lists(st.sampled_from([*CONTROL_STRINGS, "|", "ENDOFTEXT", " ", "x", "é"])).map("".join))
@settings(deadline=None)
def test_no_text_holds_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    assert not {0, DEMO_BOS} & set(tokenizer.encode(text, add_bos=False))


def test_a_known_control_token_is_its_id_among_text(tokenizer: Tokenizer, reference: Any) -> None:
    parts: list[str | int] = [DEMO_BOS, "human: hi", DEMO_BOS, " and"]
    expected = reference.encode(f"{END_OF_TEXT}human: hi{END_OF_TEXT} and", add_special_tokens=False)
    assert tokenizer.encode_parts(parts, add_bos=False) == expected


@pytest.mark.parametrize("model", [True, False], ids=["with tokenizer.model", "tokenizer.json only"])
@pytest.mark.parametrize("place", ["tokenizer.json", "added_tokens_decoder", "both"])
@pytest.mark.parametrize("text", ADDED_TEXTS)
def test_added_tokens_are_transformers_ids_in_prompts(folder: Folder, text: str, place: str, model: bool) -> None:
    decoder = {str(id): described(text, special) for id, (text, special) in ADDED.items()}
    config = SAVED_CONFIG if place == "tokenizer.json" else SAVED_CONFIG | {"added_tokens_decoder": decoder}
    path = folder(
        config,
        None if place == "added_tokens_decoder" else with_added_tokens,
        ("config.json", "tokenizer.json", *(("tokenizer.model",) if model else ())),
    )
    tokenizer, reference = Tokenizer.from_folder(path), transformers_tokenizer(path)
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert tokenizer.vocab_size == 4099
    assert tokenizer.decode(ids, from_start=True) == reference.decode(ids, skip_special_tokens=True)
    assert CITE not in text or CITE in tokenizer.decode(ids)
    assert START not in tokenizer.decode(ids)


@pytest.mark.parametrize(
    "flags", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}, {}], ids=str
)
@pytest.mark.parametrize("special", [True, False])
def test_flags_of_added_tokens_mean_what_they_mean_in_transformers(
    folder: Folder, flags: dict[str, bool], special: bool
) -> None:
    if special and "normalized" in flags:
        pytest.skip("special tokens are looked for in the text as it came")

    def change(content: dict[str, Any]) -> None:
        content["added_tokens"].append({"id": 4096, **described("[X]", special, **flags)})

    path = folder(change=change)
    tokenizer, reference = Tokenizer.from_folder(path), transformers_tokenizer(path)
    for text in ("a [X] b", "a[X]b", " [X] ", "[X][X]", "x [X]. [X]y"):
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids, from_start=True) == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("normalizers", [[], [{"type": "Lowercase"}]], ids=["the demo's", "lower case"])
def test_a_normalized_added_token_adds_its_normalized_form_to_an_answer(folder: Folder, normalizers: list[Any]) -> None:
    def change(content: dict[str, Any]) -> None:
        content["normalizer"]["normalizers"][:0] = normalizers

    words = ["[X]", "B", " b", "c ", "the"]  # some of them pieces of the vocabulary
    path = folder(change=change)
    saved = transformers_tokenizer(path)
    saved.add_tokens(words)
    saved.save_pretrained(path)
    tokenizer, reference = Tokenizer.from_folder(path), transformers_tokenizer(path)
    for token_id in reference.get_added_vocab().values():
        for ids in ([token_id], [260, token_id], [260, token_id, token_id, 671], [DEMO_BOS, token_id, 487]):
            text = reference.decode(ids, skip_special_tokens=True)
            assert tokenizer.decode(ids, from_start=True) == text
            assert tokenizer.pieces(ids) == reference.convert_ids_to_tokens(ids)


def test_added_tokens_of_the_older_file_are_added_too(folder: Folder) -> None:
    path = folder(
        SAVED_CONFIG | {"additional_special_tokens": [START, END]},
        added={text: id for id, (text, _) in ADDED.items()},
    )
    tokenizer, reference = Tokenizer.from_folder(path), transformers_tokenizer(path)
    for text in ADDED_TEXTS:
        assert tokenizer.encode(text) == reference.encode(text)


def test_added_tokens_beside_sentencepieces_file_alone(folder: Folder) -> None:
    config = {"added_tokens_decoder": {str(id): described(text, special) for id, (text, special) in ADDED.items()}}
    path = folder(config, files=("tokenizer.model",))
    tokenizer, plain = Tokenizer.from_folder(path), Tokenizer.from_folder(DEMO, add_bos=False)
    assert tokenizer.encode(f"see {CITE} there") == [*plain.encode("see "), 4098, *plain.encode(" there")]
    assert tokenizer.encode(f"{START}user{END}") == [4096, *plain.encode("user"), 4097]
    assert tokenizer.pieces([4096, 4098, 5000]) == [START, CITE, "token_id:5000"]
    assert tokenizer.decode([4096, 4098, 4097]) == CITE
    assert tokenizer.text_bytes()[4096:] == [b"", b"", CITE.encode()]
    assert tokenizer.decode(tokenizer.encode_parts([f"say {START}", 4097])) == f" say {START}"


def test_special_added_tokens_are_only_found_where_a_prompt_may_spell_them(folder: Folder) -> None:
    tokenizer = Tokenizer.from_folder(folder(change=with_added_tokens))
    assert 4096 in tokenizer.encode(f"say {START}")
    ids = tokenizer.encode_parts([f"say {START}, {CITE}"])
    assert 4096 not in ids
    assert 4098 in ids
    assert tokenizer.decode(ids, from_start=True) == f"say {START}, {CITE}"


def test_the_demos_two_files_agree_so_that_sentencepiece_decides() -> None:
    assert Tokenizer.from_folder(DEMO).uses_sentencepiece


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["model"]["vocab"][3000].__setitem__(1, -1.0),
        lambda content: content["normalizer"]["normalizers"].append({"type": "Lowercase"}),
        lambda content: content.update(normalizer=None, pre_tokenizer={"type": "Metaspace", "replacement": "▁"}),
        with_added_tokens,
    ],
    ids=["another score", "lower case", "metaspace", "added tokens"],
)
def test_where_the_two_files_disagree_tokens_are_transformers(folder: Folder, change: Any) -> None:
    path = folder(change=change, files=("config.json", "tokenizer.json", "tokenizer.model"))
    tokenizer, reference = Tokenizer.from_folder(path), transformers_tokenizer(path)
    for text in [*HARD_STRINGS, *SPACE_MARKS]:
        assert tokenizer.encode(text) == reference.encode(text)


def test_a_bpe_made_of_a_unigram_vocabulary_does_not_decide(folder: Folder) -> None:
    def change(content: dict[str, Any]) -> None:
        vocab = {text: id for id, (text, _) in enumerate(content["model"]["vocab"])}
        content["model"] = {"type": "BPE", "vocab": vocab, "merges": [["▁t", "h"]], "unk_token": "<unk>"}
        content["added_tokens"].append({"id": 4096, **described(CITE)})

    path = folder(change=change, files=("config.json", "tokenizer.json", "tokenizer.model"))
    tokenizer, plain = Tokenizer.from_folder(path), Tokenizer.from_folder(DEMO)
    assert [tokenizer.encode(text) for text in HARD_STRINGS] == [plain.encode(text) for text in HARD_STRINGS]
    assert tokenizer.encode(CITE) == [DEMO_BOS, 4096]
    assert tokenizer.notices == (
        "tokenizer.json is a BPE model made from the vocabulary of tokenizer.model, which is a Unigram model: using "
        "tokenizer.model",
    )


TEMPLATE = {
    "type": "TemplateProcessing",
    "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [1], "tokens": []}},
}
TEXT_PART, TOKEN_PART = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
PAIR = [TEXT_PART, {"Sequence": {"id": "B", "type_id": 1}}]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


@pytest.mark.parametrize(
    "processor",
    [
        None,
        TEMPLATE | {"single": [TEXT_PART], "pair": PAIR},
        TEMPLATE | {"single": [TOKEN_PART, TEXT_PART], "pair": PAIR},
        TEMPLATE | {"single": [TEXT_PART, TOKEN_PART], "pair": PAIR},
        TEMPLATE | {"single": [TOKEN_PART, TOKEN_PART, TEXT_PART, TOKEN_PART], "pair": PAIR},
        {"type": "Sequence", "processors": [TEMPLATE | {"single": [TOKEN_PART, TEXT_PART], "pair": PAIR}]},
        {"type": "Sequence", "processors": [BYTE_LEVEL, TEMPLATE | {"single": [TOKEN_PART, TEXT_PART], "pair": PAIR}]},
        BYTE_LEVEL | {"type": "RobertaProcessing", "sep": ["<unk>", 0], "cls": [END_OF_TEXT, 1]},
        BYTE_LEVEL,
    ],
    ids=lambda processor: json.dumps(processor)[:40],
)
@pytest.mark.parametrize("model", [True, False], ids=["with tokenizer.model", "tokenizer.json only"])
def test_what_stands_around_a_text_is_what_the_post_processor_says(
    folder: Folder, processor: dict[str, Any] | None, model: bool
) -> None:
    files = ("config.json", "tokenizer.json", *(("tokenizer.model",) if model else ()))
    path = folder(change=lambda content: content.update(post_processor=processor), files=files)
    tokenizer, reference = Tokenizer.from_folder(path), transformers_tokenizer(path)
    for text in ("", "Hello there"):
        assert tokenizer.encode(text) == reference.encode(text)
    bare = tokenizer.encode("Hello there", add_bos=False)
    assert bare == reference.encode("Hello there", add_special_tokens=False)
    assert Tokenizer.from_folder(path, add_bos=True).encode("Hello there")[0] == DEMO_BOS
    assert Tokenizer.from_folder(path, add_bos=False).encode("Hello there")[0] == bare[0]


def test_tokenizer_config_wins_over_the_post_processor_and_that_is_said(folder: Folder) -> None:
    tokenizer = Tokenizer.from_folder(folder(SAVED_CONFIG | {"add_bos_token": False}))
    assert tokenizer.encode("Hello") == tokenizer.encode("Hello", add_bos=False)
    (notice,) = tokenizer.notices
    assert notice.startswith("tokenizer_config.json has add_bos_token false")
    assert "--add-bos true" in notice
    assert not Tokenizer.from_folder(folder(SAVED_CONFIG | {"add_bos_token": True})).notices


def test_texts_end_with_eos_where_tokenizer_config_says_so(folder: Folder) -> None:
    tokenizer = Tokenizer.from_folder(
        folder({"add_eos_token": True, "eos_token": END_OF_TEXT}, files=("tokenizer.model",))
    )
    assert tokenizer.encode("Hello") == [*tokenizer.encode("Hello", add_bos=False), DEMO_BOS]


@pytest.fixture
def byte_level_bpe(tmp_path: Path) -> Path:
    """A BPE over bytes, as many newer models have it."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(HARD_STRINGS * 3, trainer)
    library.add_tokens([CITE])
    library.save(str(tmp_path / "tokenizer.json"))
    shutil.copy(DEMO / "config.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return tmp_path


def test_a_byte_level_bpe_has_transformers_ids_and_text(byte_level_bpe: Path) -> None:
    tokenizer, reference = Tokenizer.from_folder(byte_level_bpe), transformers_tokenizer(byte_level_bpe)
    for text in [*HARD_STRINGS[:-1], f"see {CITE} é", "   leading"]:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids, from_start=True) == reference.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer.encode("a<|endoftext|>b")) == "a<|endoftext|>b"
    assert not set(tokenizer.encode("<|endoftext|>")) & {0}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "holds a JSON list"),
        (b"{}", "model is None"),
        (b'{"model": 3}', "model is 3"),
        (b'{"model": {"type": "WordLevel", "vocab": {}}}', 'model.type is \'WordLevel\'.* "Unigram" or "BPE"'),
        (b'{"model": {"type": "Unigram", "vocab": []}}', "model.vocab is "),
        (b'{"model": {"type": "Unigram", "vocab": [["a"]]}}', "model.vocab is .* pairs of a token and its score"),
        (b'{"model": {"type": "BPE", "vocab": {"a": "b"}}}', "model.vocab is .* an id for each token"),
        (
            b'{"model": {"type": "BPE", "vocab": {"a": 123456789012}}}',
            "has token ids that are not valid; expected ids below",
        ),
        (b'{"model": {"vocab": [["a", 0]]}, "added_tokens": [{"id": 1}]}', r"added_tokens\[0\].content is None"),
        (b'{"model": ' * 50_000, "nested too deeply"),
        (b'{"model": {"vocab": [["a", 0]]}, "post_processor": {"type": "Strange"}}', "its post_processor is 'Strange'"),
        (
            b'{"model": {"vocab": [["a", 0]]}, "post_processor": {"type": "TemplateProcessing"}}',
            "post_processor of type .* is not supported",
        ),
        (b'{"model": {"vocab": [["a", 0]]}, "decoder": {"type": "CTC"}}', "its decoder has the step 'CTC'"),
        (b'{"model": {"vocab": [["a", 0]]}}', "its decoder has the step"),
        (
            b'{"model": {"vocab": [["a", 0]], "unk_id": 7}, "decoder": {"type": "Fuse"}}',
            "the tokenizers library cannot load this file",
        ),
        (
            b'{"model": {"vocab": [["a", 0]]}, "decoder": {"type": "Fuse"},'
            b' "added_tokens": [{"id": 9, "content": "b"}]}',
            "the added token 'b' has the id 9, but the tokenizers library gives it 1",
        ),
    ],
)
def test_a_file_of_no_use_is_one_line_that_names_it(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'tokenizer.json'}")
    assert "\n" not in str(caught.value)


def test_a_file_of_gigabytes_is_refused_without_reading_it(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**36)
    with pytest.raises(CheckpointError, match="has 68719476736 bytes"):
        Tokenizer.from_folder(tmp_path)


def test_ids_at_odds_are_an_error_that_names_the_token(folder: Folder) -> None:
    decoder = {"4097": described(CITE)}
    with pytest.raises(CheckpointError, match=r"added token '\[CITE\]' has the id 4096, but 4097 in the files next to"):
        Tokenizer.from_folder(
            folder(
                SAVED_CONFIG | {"added_tokens_decoder": decoder},
                lambda content: content["added_tokens"].append({"id": 4096, **described(CITE)}),
            )
        )


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"added_tokens_decoder": []}, "added_tokens_decoder is .*an object"),
        ({"added_tokens_decoder": {"x": described("a")}}, "'x' does not have a valid token id"),
        ({"added_tokens_decoder": {"99999999": described("a")}}, "'99999999' does not have a valid token id"),
        ({"added_tokens_decoder": {"5": "a"}}, "added_tokens_decoder.5 is 'a'"),
        ({"added_tokens_decoder": {"5": {"special": True}}}, "added_tokens_decoder.5.content is None"),
        ({"added_tokens_decoder": {"4096": described("")}}, "or one is empty"),
        ({"add_eos_token": "yes"}, "add_eos_token is 'yes'"),
    ],
    ids=str,
)
def test_added_tokens_of_no_use_are_one_line(folder: Folder, config: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        Tokenizer.from_folder(folder(config))


def test_the_backend_of_a_folder_without_sentencepiece_is_the_library(tokenizer: Tokenizer) -> None:
    assert not tokenizer.uses_sentencepiece
