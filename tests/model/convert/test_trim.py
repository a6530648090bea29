"""Trimming the vocabulary: only unused ids go, every other row is the same bits, and ids stay what they were."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from persimmon.model.config import PersimmonConfig
from persimmon.model.convert import SourceLayout, convert_checkpoint, writer
from persimmon.model.convert.trim import trim_vocabulary
from persimmon.model.convert.writer import Conversion
from persimmon.model.errors import CheckpointError
from persimmon.model.tokenizer import END_OF_TEXT, Tokenizer
from persimmon.model.vocabulary import VOCABULARY_FILE, VocabularyMap
from tests.engine_harness import load_model
from tests.model.checkpoints import DEMO, DEMO_END_OF_TEXT, DEMO_VOCAB_SIZE, make_checkpoint
from tests.model.convert.adept_layout import make_release
from tests.model.convert.placeholders import TABLES, Piece, edit, set_tokenizer, tokenizer_model, with_placeholders
from tests.model.forward_pass import hidden_states

PLACEHOLDERS = 48
UNUSED = range(1, 1 + PLACEHOLDERS)  # between <unk> and |ENDOFTEXT|
TEXT = "A persimmon is 12 fruits."


def small_checkpoint(folder: Path, vocab_size: int = DEMO_VOCAB_SIZE, **settings: Any) -> Path:
    return make_checkpoint(
        folder, vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=1, **settings
    )


@pytest.fixture
def original(tmp_path):
    """A checkpoint with control pieces that nothing names."""
    return with_placeholders(small_checkpoint(tmp_path / "small"), tmp_path / "original", PLACEHOLDERS)


def trim(
    source: Path,
    out: Path,
    *,
    drop_ids: Sequence[range] | None = None,
    layout: SourceLayout = "hugging_face",
    dtype: str | None = None,
    max_shard_bytes: int = 10**9,
) -> list[str]:
    lines: list[str] = []
    convert_checkpoint(
        str(source),
        out,
        layout=layout,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        print_line=lines.append,
        trim_vocab=drop_ids is None,
        drop_ids=drop_ids,
    )
    return lines


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def map_of(folder: Path) -> VocabularyMap:
    vocabulary = VocabularyMap.from_folder(folder, PersimmonConfig.from_folder(folder))
    assert vocabulary is not None
    return vocabulary


def kept_of(folder: Path) -> set[int]:
    return {*map_of(folder).ids}


def all_but(dropped: range, size: int = DEMO_VOCAB_SIZE + PLACEHOLDERS) -> list[int]:
    return [id for id in range(size) if id not in dropped]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("chunk_bytes", [writer.CHUNK_BYTES, 3000])
def test_rows_that_are_kept_are_the_same_bits_and_so_are_all_other_tensors(
    original, dtype, chunk_bytes, tmp_path, monkeypatch
):
    monkeypatch.setattr(writer, "CHUNK_BYTES", chunk_bytes)
    trim(original, tmp_path / "out", dtype=dtype)
    expected, actual = tensors_of(original), tensors_of(tmp_path / "out")
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        kept = tensor[all_but(UNUSED)] if name in TABLES else tensor
        assert torch.equal(actual[name], kept.to(getattr(torch, dtype or "float32"))), name


def test_logits_of_kept_ids_are_the_same_bits_step_by_step(original, tmp_path):
    trim(original, tmp_path / "out")
    vocabulary = map_of(tmp_path / "out")
    whole, trimmed = load_model(original), load_model(tmp_path / "out")
    ids = Tokenizer.from_folder(original).encode(TEXT)
    for _ in range(6):
        # Random weights may favour an id that was dropped, as a trained network's do not: the best is one of the rest.
        expected = whole.logits(hidden_states(whole, ids))[:, all_but(UNUSED)]
        actual = trimmed.logits(hidden_states(trimmed, vocabulary.to_rows(ids)))
        assert torch.equal(actual, expected)
        best = int(expected[-1].argmax())
        assert vocabulary.to_ids([best]) == [all_but(UNUSED)[best]]
        ids = [*ids, *vocabulary.to_ids([best])]


def test_transformers_loads_the_result_and_takes_rows(original, tmp_path):
    from transformers import PersimmonForCausalLM

    trim(original, tmp_path / "out")
    whole, trimmed = map(PersimmonForCausalLM.from_pretrained, (original, tmp_path / "out"))
    ids = Tokenizer.from_folder(original).encode(TEXT)
    with torch.no_grad():
        expected = whole(torch.tensor([ids])).logits
        actual = trimmed(torch.tensor([map_of(tmp_path / "out").to_rows(ids)])).logits
    torch.testing.assert_close(actual, expected[..., all_but(UNUSED)])
    assert trimmed.generation_config.eos_token_id == 1


def test_the_map_has_the_ids_and_the_other_files_have_rows(original, tmp_path):
    trim(original, tmp_path / "out")
    assert json.loads((tmp_path / "out" / VOCABULARY_FILE).read_text()) == {
        "vocab_size": DEMO_VOCAB_SIZE + PLACEHOLDERS,
        "kept_ids": [[0, 1], [1 + PLACEHOLDERS, DEMO_VOCAB_SIZE + PLACEHOLDERS]],
    }
    rows = PersimmonConfig.from_folder(tmp_path / "out")
    assert (rows.vocab_size, rows.bos_token_id, rows.eos_token_ids) == (DEMO_VOCAB_SIZE, 1, (1,))
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 1
    assert map_of(tmp_path / "out").original(rows) == PersimmonConfig.from_folder(original)


def test_the_tokenizer_stays_as_it_is(original, tmp_path):
    trim(original, tmp_path / "out")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (original / name).read_bytes()
    ids = Tokenizer.from_folder(tmp_path / "out").encode(TEXT)
    assert map_of(tmp_path / "out").to_rows(ids) == [max(0, id - PLACEHOLDERS) for id in ids]


def test_what_is_dropped_is_said_with_the_reason(original, tmp_path):
    lines = trim(original, tmp_path / "out")
    assert f"{original}: dropping 48 of 4,144 token ids saves" in lines[0]
    assert lines[1] == "  48 control pieces, which no text is tokenized to: 1 '|0|' to 48 '|47|'"


def test_ids_beyond_the_tokenizer_go_and_the_others_are_their_rows_so_no_map_is_needed(tmp_path):
    from transformers import PersimmonForCausalLM

    original = small_checkpoint(tmp_path / "original", DEMO_VOCAB_SIZE + 100)
    lines = trim(original, tmp_path / "out")
    # 16 at a time: the number of rows stays as divisible as it was.
    rows = DEMO_VOCAB_SIZE + 4
    assert "96 of 4,196" in lines[0]
    assert lines[1:3] == [
        "  100 ids beyond the tokenizer's: 4096 to 4195",
        "  4 of these are kept, because rows are dropped 16 at a time",
    ]
    assert not (tmp_path / "out" / VOCABULARY_FILE).exists()
    whole, trimmed = map(PersimmonForCausalLM.from_pretrained, (original, tmp_path / "out"))
    assert trimmed.config.vocab_size == rows
    with torch.no_grad():
        expected, actual = (model(torch.tensor([[5, 7, 1, 300]])).logits for model in (whole, trimmed))
    torch.testing.assert_close(actual, expected[..., :rows])


def test_control_pieces_at_the_end_of_the_tokenizer_go_with_a_map_since_the_tokenizer_keeps_them(tmp_path):
    original = small_checkpoint(tmp_path / "original", DEMO_VOCAB_SIZE + 16)
    model = tokenizer_model(0, Piece.CONTROL)
    model.pieces.extend(Piece(piece=f"|{number}|", score=0, type=Piece.CONTROL) for number in range(16))
    set_tokenizer(original, model, DEMO_END_OF_TEXT)
    trim(original, tmp_path / "out")
    assert map_of(tmp_path / "out").content == {"vocab_size": DEMO_VOCAB_SIZE + 16, "kept_ids": [[0, DEMO_VOCAB_SIZE]]}


def test_embeddings_that_are_tied_are_trimmed_once(tmp_path):
    original = small_checkpoint(tmp_path / "original", DEMO_VOCAB_SIZE + 64, tie_word_embeddings=True)
    trim(original, tmp_path / "out")
    expected, actual = (tensors_of(folder)["model.embed_tokens.weight"] for folder in (original, tmp_path / "out"))
    assert torch.equal(actual, expected[:DEMO_VOCAB_SIZE])
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")


def pad_in_tokenizer_config(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", {"pad_token": {"content": "|7|"}})


def pad_in_special_tokens_map(folder: Path) -> None:
    edit(folder / "special_tokens_map.json", {"additional_special_tokens": ["|7|"]})


def pad_in_generation_config(folder: Path) -> None:
    edit(folder / "generation_config.json", {"pad_token_id": 8})


def second_end_in_generation_config(folder: Path) -> None:
    edit(folder / "generation_config.json", {"eos_token_id": [1 + PLACEHOLDERS, 8]})


def in_chat_template(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", {"chat_template": "{% for m in messages %}|7|{{ m.content }}{% endfor %}"})


def in_chat_template_file(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("|7|{{ messages }}")


def padding_of_the_tokenizer(folder: Path) -> None:
    model = tokenizer_model(PLACEHOLDERS, Piece.CONTROL)
    model.trainer_spec.pad_id = 8
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    "name_it",
    [
        padding_of_the_tokenizer,
        pad_in_tokenizer_config,
        pad_in_special_tokens_map,
        pad_in_generation_config,
        second_end_in_generation_config,
        in_chat_template,
        in_chat_template_file,
    ],
)
def test_control_pieces_that_a_file_names_stay(original, name_it, tmp_path):
    name_it(original)
    trim(original, tmp_path / "out")
    kept = kept_of(tmp_path / "out")
    assert 8 in kept
    assert len(kept & {*UNUSED}) == 16


def test_what_begins_texts_stays_where_no_file_names_it(original, tmp_path):
    (original / "tokenizer_config.json").unlink()
    for name in ("config.json", "generation_config.json"):
        edit(original / name, {"bos_token_id": None, "eos_token_id": 8})
    trim(original, tmp_path / "out")
    assert {8, 1 + PLACEHOLDERS} <= kept_of(tmp_path / "out")


def test_padding_is_a_row_too(original, tmp_path):
    edit(original / "generation_config.json", {"pad_token_id": 40, "other_token_id": [-1, None, 40]})
    trim(original, tmp_path / "out")
    (row,) = map_of(tmp_path / "out").to_rows([40])
    values = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert row < 40
    assert (values["pad_token_id"], values["other_token_id"]) == (row, [-1, None, row])


def test_control_pieces_that_are_only_listed_as_added_tokens_go(original, tmp_path):
    listed = {str(id): {"content": f"|{id - 1}|", "special": True} for id in UNUSED}
    edit(original / "tokenizer_config.json", {"added_tokens_decoder": listed})
    trim(original, tmp_path / "out")
    assert not kept_of(tmp_path / "out") & {*UNUSED}


ADDED = DEMO_VOCAB_SIZE + 40


def added_in_its_file(folder: Path) -> None:
    edit(folder / "added_tokens.json", {"<|im_end|>": ADDED})


def added_in_tokenizer_config(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", {"added_tokens_decoder": {str(ADDED): {"content": "<|im_end|>"}}})


def added_in_tokenizer_json(folder: Path) -> None:
    edit(folder / "tokenizer.json", {"added_tokens": [{"id": ADDED, "content": "<|im_end|>"}]})


@pytest.mark.parametrize("add", [added_in_its_file, added_in_tokenizer_config, added_in_tokenizer_json])
def test_tokens_that_transformers_adds_beyond_the_tokenizer_stay(add, tmp_path):
    original = small_checkpoint(tmp_path / "original", DEMO_VOCAB_SIZE + 64)
    add(original)
    trim(original, tmp_path / "out")
    assert map_of(tmp_path / "out").kept(ADDED)
    assert len(map_of(tmp_path / "out").ids) == DEMO_VOCAB_SIZE + 16


def test_what_is_unused_follows_the_file_that_decides_on_tokens(tmp_path):
    original = small_checkpoint(tmp_path / "original", DEMO_VOCAB_SIZE + 64)
    content = json.loads((DEMO / "tokenizer.json").read_text())
    content["added_tokens"].append({"id": DEMO_VOCAB_SIZE, "content": "<|im_end|>", "special": True})
    (original / "tokenizer.json").write_text(json.dumps(content))
    trim(original, tmp_path / "out")
    # The ids that are left are their rows, the added token's is the 4097th.
    assert PersimmonConfig.from_folder(tmp_path / "out").vocab_size == DEMO_VOCAB_SIZE + 16
    assert Tokenizer.from_folder(tmp_path / "out").encode("<|im_end|>")[-1] == DEMO_VOCAB_SIZE
    content["model"]["vocab"][3000][0] = "other"
    (original / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError,
        match=r"tokenized with tokenizer\.json, .* found in tokenizer\.model, and the "
        r"two have different pieces",
    ):
        trim(original, tmp_path / "other")


def user_defined(folder: Path) -> Path:
    """A checkpoint with user-defined placeholders, and numbers that are user-defined too."""
    small_checkpoint(folder, DEMO_VOCAB_SIZE + PLACEHOLDERS + 80)
    set_tokenizer(folder, tokenizer_model(PLACEHOLDERS, Piece.USER_DEFINED, numbers=64), 1 + PLACEHOLDERS + 64)
    return folder


def test_user_defined_pieces_stay_unless_they_are_asked_for(tmp_path):
    original = user_defined(tmp_path / "original")
    assert 8 in Tokenizer.from_folder(original).encode("|7|")
    lines = trim(original, tmp_path / "out")
    assert "16 ids beyond the tokenizer's" in lines[1]
    kept = "112 user-defined pieces are kept, because text that spells them is tokenized to them: 1 '|0|' to 112 '1063'"
    assert kept in lines[2]
    trim(original, tmp_path / "asked", drop_ids=[UNUSED])
    assert map_of(tmp_path / "asked").kept_ids == (range(1), range(49, 4224))


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        (range(4144, 4160), "token id 4144 does not exist; the last one is 4143"),
        (range(1), "0 '<unk>' cannot be dropped: texts are tokenized to it"),
        (range(40, 60), "49 '|ENDOFTEXT|' cannot be dropped: the files name it"),
        (range(51, 52), "51 '<0x01>' cannot be dropped: texts are tokenized to it"),
        (range(4143, 4144), "4143 'u' cannot be dropped: texts are tokenized to it"),
        (
            range(1, 9),
            "too few of its 4,144 token ids are unused; there is nothing to trim; 8 requested ids: 1 '|0|' to 8 '|7|'",
        ),
    ],
)
def test_ids_that_cannot_go_are_refused_before_anything_is_written(original, ids, named, tmp_path):
    with pytest.raises(CheckpointError) as raised:
        trim(original, tmp_path / "out", drop_ids=[ids])
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_of_which_all_is_used_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match="none of its 4,096 token ids are unused; there is nothing to trim"):
        trim(DEMO, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_a_tokenizer_nothing_is_known_to_be_unused(original, tmp_path):
    (original / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.model, which is needed to find the unused token ids"):
        trim(original, tmp_path / "out")


def test_a_trimmed_checkpoint_is_not_trimmed_again_but_converted_with_its_map(original, tmp_path):
    trim(original, tmp_path / "out")
    with pytest.raises(CheckpointError, match="already trimmed"):
        trim(tmp_path / "out", tmp_path / "again")
    convert_checkpoint(
        str(tmp_path / "out"),
        tmp_path / "half",
        layout="hugging_face",
        dtype="float16",
        max_shard_bytes=10**9,
        print_line=lambda _: None,
    )
    assert map_of(tmp_path / "half").content == map_of(tmp_path / "out").content
    assert PersimmonConfig.from_folder(tmp_path / "half").eos_token_ids == (1,)


def test_adepts_release_is_trimmed_as_it_is_converted(original, tmp_path):
    release = make_release(original, tmp_path / "release", ranks=2)
    trim(release, tmp_path / "out", layout="adept", max_shard_bytes=300_000)
    expected, actual = tensors_of(original), tensors_of(tmp_path / "out")
    for name in TABLES:
        assert torch.equal(actual[name], expected[name][all_but(UNUSED)]), name
    assert PersimmonConfig.from_folder(tmp_path / "out").eos_token_ids == (1,)
    assert map_of(tmp_path / "out").to_ids([1]) == [1 + PLACEHOLDERS]


def test_a_map_that_is_wrong_is_found_before_anything_is_written(original, tmp_path):
    (original / VOCABULARY_FILE).write_text('{"vocab_size": 5000, "kept_ids": [[0, 1]]}')
    with pytest.raises(CheckpointError, match=rf"{VOCABULARY_FILE}: kept_ids is"):
        trim(original, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class StoppedError(Exception):
    """The machine goes off."""


def test_trimming_that_was_cut_off_goes_on_with_the_same_ids_alone(original, tmp_path, monkeypatch):
    write_shard, written = writer._write_shard, iter(range(2))

    def stopping(*arguments):
        if next(written, None) is None:
            raise StoppedError
        write_shard(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_shard", stopping)
        with pytest.raises(StoppedError):
            trim(original, tmp_path / "out", max_shard_bytes=300_000)
    with pytest.raises(CheckpointError, match="with other settings"):
        trim(original, tmp_path / "out", drop_ids=[range(1, 33)], max_shard_bytes=300_000)
    lines = trim(original, tmp_path / "out", max_shard_bytes=300_000)
    assert sum("kept and verified" in line for line in lines) == 2
    assert torch.equal(tensors_of(tmp_path / "out")[TABLES[1]], tensors_of(original)[TABLES[1]][all_but(UNUSED)])


def test_a_row_that_was_written_wrongly_is_found(original, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_bytes", lambda rows: torch.zeros_like(rows).view(torch.uint8).numpy().data)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight read back differs from what was written"):
        trim(original, tmp_path / "out")


@dataclass(frozen=True)
class Unread:
    """A tensor that is never read."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16

    def rows(self, start: int, stop: int) -> torch.Tensor:
        raise AssertionError("trimming reads no tensor")


def adepts_vocabulary(kind: int) -> Any:
    """As much of Adept's vocabulary as is known: its size, the placeholders' and |ENDOFTEXT|'s places, the numbers."""
    demo = ModelProto.FromString((DEMO / "tokenizer.model").read_bytes())
    model = ModelProto(trainer_spec=demo.trainer_spec, normalizer_spec=demo.normalizer_spec)
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id = 0, 1, 2
    model.pieces.add(piece="<unk>", score=0, type=Piece.UNKNOWN)
    model.pieces.extend(Piece(piece=piece, score=0, type=Piece.CONTROL) for piece in ("<s>", "</s>"))
    model.pieces.extend(Piece(piece=f"|{number}|", score=0, type=kind) for number in range(70_000))
    model.pieces.extend(Piece(piece=str(number), score=0, type=Piece.USER_DEFINED) for number in range(1000))
    model.pieces.extend(Piece(piece=f"|X{number}|", score=0, type=Piece.USER_DEFINED) for number in range(10))
    model.pieces.add(piece=END_OF_TEXT, score=0, type=Piece.USER_DEFINED)
    model.pieces.extend(
        Piece(piece=f"▁w{number}", score=-12.0, type=Piece.NORMAL) for number in range(262144 - len(model.pieces))
    )
    return model


CONFIG_8B = PersimmonConfig(
    vocab_size=262144,
    hidden_size=4096,
    intermediate_size=16384,
    num_hidden_layers=36,
    num_attention_heads=64,
    max_position_embeddings=16384,
    bos_token_id=71013,
    eos_token_ids=(71013,),
)


@pytest.mark.parametrize(
    ("kind", "drop_ids"), [(Piece.CONTROL, None), (Piece.UNUSED, None), (Piece.USER_DEFINED, [range(3, 70_003)])]
)
def test_of_adepts_vocabulary_the_70000_placeholders_go_and_its_placeholder_ends_are_put_right(kind, drop_ids):
    values = {"vocab_size": 262144, "bos_token_id": 1, "eos_token_id": 2}  # as Transformers' conversion wrote them
    files = {
        "config.json": json.dumps(values).encode(),
        "tokenizer.model": adepts_vocabulary(kind).SerializeToString(),
    }
    tensors = dict.fromkeys(TABLES, Unread((262144, 4096)))
    lines: list[str] = []
    conversion = Conversion(
        origin={"source": "8b"}, config=CONFIG_8B, tensors=tensors, dtype=None, max_shard_bytes=10**9, files=files
    )
    trimmed = trim_vocabulary(conversion, drop_ids, lines.append)
    assert lines[0] == "8b: dropping 70,000 of 262,144 token ids saves 1.07 GiB"
    assert trimmed.config.vocab_size == 192144
    assert [tensor.shape for tensor in trimmed.tensors.values()] == [(192144, 4096)] * 2
    assert json.loads(trimmed.files["config.json"]) == {
        "vocab_size": 192144,
        "bos_token_id": 1013,
        "eos_token_id": 1013,
    }
    assert json.loads(trimmed.files[VOCABULARY_FILE])["kept_ids"] == [[0, 3], [70003, 262144]]


def test_what_begins_and_ends_texts_stays_whatever_the_tokenizer_calls_it():
    config = replace(CONFIG_8B, bos_token_id=100, eos_token_ids=(200, 300))
    files = {"config.json": b"{}", "tokenizer.model": adepts_vocabulary(Piece.CONTROL).SerializeToString()}
    tensors = dict.fromkeys(TABLES, Unread((262144, 4096)))
    conversion = Conversion(
        origin={"source": "8b"}, config=config, tensors=tensors, dtype=None, max_shard_bytes=10**9, files=files
    )
    trimmed = trim_vocabulary(conversion, None, lambda _: None)
    # 69,997 are unused; 13 of those stay, the first ones, for rows are dropped 16 at a time.
    assert (trimmed.config.bos_token_id, trimmed.config.eos_token_ids) == (16, (17, 18))
