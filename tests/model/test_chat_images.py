"""Conversations with images: in Fuyu's own format, and by a checkpoint's template that has a place for them."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from persimmon.model.chat import Chat
from persimmon.model.chat_format import ChatFormatError, Turn
from persimmon.model.chat_prompt import ImageTokens
from persimmon.model.chat_template_files import ChatTemplateError
from persimmon.model.config import VisionConfig
from persimmon.model.errors import CheckpointError
from persimmon.model.images import ImagePatches, ImageReader, ImageSettings
from persimmon.model.tokenizer import Tokenizer
from tests.fuyu import BOS, NEWLINE, SPEAKER, write_tokenizer
from tests.model.checkpoints import DEMO

PATCH = 2
VISION = VisionConfig(patch_size=PATCH, image_token_id=SPEAKER)
WITH_IMAGES = (
    "{% for m in messages %}{{ m.role }}:"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ '|SPEAKER|<s>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def picture(rows: int, columns: int, seed: int = 0, scale: float = 1.0) -> ImagePatches:
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, columns * PATCH**2 * 3), dtype=np.uint8)
    return ImagePatches(
        rows=rows,
        columns=columns,
        pixels=tuple(row.tobytes() for row in pixels),
        height=rows * PATCH,
        width=columns * PATCH,
        scale=scale,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuyu")
    shutil.copy(DEMO / "config.json", path)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def chat(folder: Path, tokenizer: Tokenizer) -> Chat:
    return Chat.from_folder(folder, tokenizer, image_tokens=ImageTokens.of(VISION, tokenizer))


@pytest.fixture
def templated(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> Callable[[str], Chat]:
    def of(template: str) -> Chat:
        own = tmp_path / "templated"
        shutil.copytree(folder, own)
        (own / "chat_template.jinja").write_text(template)
        return Chat.from_folder(own, tokenizer, image_tokens=ImageTokens.of(VISION, tokenizer))

    return of


def text(tokenizer: Tokenizer, *texts: str) -> list[int]:
    return [token_id for each in texts for token_id in tokenizer.encode_parts([each], add_bos=False)]


def answer(tokenizer: Tokenizer) -> int:
    token_id = tokenizer.token_id("<0x04>")
    assert token_id is not None
    return token_id


def rows_of(rows: int, columns: int) -> list[int]:
    return [*[SPEAKER] * columns, NEWLINE] * rows


def test_an_image_and_a_question_are_the_processors_prompt(chat: Chat, tokenizer: Tokenizer) -> None:
    prompt = chat.of_contents([("user", [picture(2, 3), "Describe this."])])
    expected = [*rows_of(2, 3), BOS, *text(tokenizer, "Describe this.\n"), answer(tokenizer)]
    assert prompt.token_ids(tokenizer) == expected
    assert prompt.num_image_tokens == 8


def test_a_conversation_of_texts_begins_with_bos(chat: Chat, tokenizer: Tokenizer) -> None:
    expected = [BOS, *text(tokenizer, "Be brief.\nHi\n"), answer(tokenizer)]
    assert chat.of_contents([("system", ["Be brief."]), ("user", ["Hi"])]).token_ids(tokenizer) == expected
    assert chat.of_turns([Turn("system", "Be brief."), Turn("user", "Hi")]).token_ids(tokenizer) == expected
    assert chat.of_turns([Turn("user", "Hi")], begin_answer=False).token_ids(tokenizer) == [
        BOS,
        *text(tokenizer, "Hi\n"),
    ]


def test_images_stand_where_they_are_in_the_messages(chat: Chat, tokenizer: Tokenizer) -> None:
    small, large = picture(1, 1), picture(2, 2, seed=1)
    prompt = chat.of_contents(
        [("user", ["Here is", small, "and here", large]), ("assistant", ["A dot."]), ("user", [small, "And this?"])]
    )
    token_ids = prompt.token_ids(tokenizer)
    assert token_ids == [
        BOS,
        *text(tokenizer, "Here is"),
        *(*rows_of(1, 1), BOS),
        *text(tokenizer, "and here"),
        *(*rows_of(2, 2), BOS),
        *text(tokenizer, "\nA dot.\n"),
        *(*rows_of(1, 1), BOS),
        *text(tokenizer, "And this?\n"),
        answer(tokenizer),
    ]
    rows = list(prompt.image_rows(token_ids))
    assert [(digest, pixels) for _, _, digest, pixels in rows] == [
        (image.digests[row], image.pixels[row]) for image in (small, large, small) for row in range(image.rows)
    ]
    for start, length, _, _ in rows:
        assert token_ids[start : start + length] == [SPEAKER] * length
        assert token_ids[start + length] == NEWLINE


def test_tags_are_in_the_pixels_of_the_image_before_them_or_of_the_first(chat: Chat, tokenizer: Tokenizer) -> None:
    def number(content: list[str | ImagePatches]) -> list[str]:
        token_ids = chat.of_contents([("user", content)]).token_ids(tokenizer)
        opening = [place for place, piece in enumerate(tokenizer.pieces(token_ids)) if piece == "<0x02>"]
        return [tokenizer.pieces(token_ids)[place + 1] for place in opening]

    first, second = picture(1, 1, scale=1.0), picture(1, 1, scale=0.5)
    tag = "<point>8, 8</point>"
    assert number([tag, first, tag, second, tag]) == ["4", "4", "2"]
    assert number([tag]) == []


def test_a_message_cannot_spell_the_tokens_of_images(chat: Chat, tokenizer: Tokenizer) -> None:
    prompt = chat.of_contents([("user", [picture(1, 1), "|SPEAKER||NEWLINE|<s><0x04>"])])
    token_ids = prompt.token_ids(tokenizer)
    assert [token_ids.count(id) for id in (SPEAKER, NEWLINE, BOS, answer(tokenizer))] == [1, 1, 1, 1]


def test_an_answer_that_has_begun_is_a_text_of_its_own(chat: Chat, tokenizer: Tokenizer) -> None:
    prompt = chat.of_contents([("user", [picture(1, 1), "Hi"])])
    begun = prompt.followed_by(" [1").token_ids(tokenizer)
    assert begun == [*prompt.token_ids(tokenizer), *text(tokenizer, "[1")]


def test_the_last_message_is_not_the_assistants(chat: Chat) -> None:
    with pytest.raises(ChatFormatError, match="must end with a user or tool message"):
        chat.of_contents([("user", [picture(1, 1)]), ("assistant", ["Yes."])])


def test_a_log_names_an_image_by_its_size(chat: Chat, tokenizer: Tokenizer) -> None:
    shown = chat.of_contents([("user", [picture(2, 3), "Hi"])]).text(tokenizer)
    assert shown == "<image 6x4>Hi\n<0x04>"


def test_a_template_has_a_place_for_images(templated: Callable[[str], Chat], tokenizer: Tokenizer) -> None:
    chat = templated(WITH_IMAGES)
    assert chat.takes_images
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a |SPEAKER|"}]}]
    prompt = chat.of_messages(messages, images=[picture(1, 2)])
    assert prompt.token_ids(tokenizer) == [
        *text(tokenizer, "user:"),
        *(*rows_of(1, 2), BOS),
        *text(tokenizer, "a |SPEAKER|\nassistant:"),
    ]
    ended = chat.of_messages(messages, images=[picture(1, 2)], begin_answer=False)
    assert ended.token_ids(tokenizer)[-1] != prompt.token_ids(tokenizer)[-1]


def test_or_it_has_none(templated: Callable[[str], Chat]) -> None:
    chat = templated("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert not chat.takes_images


def test_a_template_that_leaves_an_image_out_is_an_error(templated: Callable[[str], Chat]) -> None:
    chat = templated(WITH_IMAGES.replace("part.type == 'image'", "part.type == 'image' and loop.index < 4"))
    message = {"role": "user", "content": [{"type": "image"}] * 5}
    with pytest.raises(ChatTemplateError, match="it writes 3 placeholders for 5 images"):
        chat.of_messages([message], images=[picture(1, 1)] * 5)


def test_a_vocabulary_without_the_tokens_is_an_error_that_names_one(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks the token '\|NEWLINE\|'"):
        ImageTokens.of(VISION, Tokenizer.from_folder(tmp_path))


def test_a_prompt_without_images_has_no_rows(chat: Chat, tokenizer: Tokenizer) -> None:
    prompt = chat.of_turns([Turn("user", "Hi")])
    assert list(prompt.image_rows(prompt.token_ids(tokenizer))) == []
    assert prompt.num_image_tokens == 0


@pytest.mark.parametrize("question", ["Describe this.", "", " Two\nlines, 日本 "])
def test_one_image_and_one_text_are_fuyu_processors_prompt(tmp_path: Path, question: str) -> None:
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Library
    from transformers import FuyuProcessor, PreTrainedTokenizerFast
    from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

    # As in Fuyu-8B, pieces and not special tokens stand for images.
    names = ["<unk>", "<s>", "|SPEAKER|", "|NEWLINE|", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁th", "is"]
    library = Library(models.Unigram([(name, 0.0) for name in names], unk_id=0, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [AddedToken(name, normalized=False, special=True) for name in ("<unk>", "<s>", "<0x04>")]
    library.add_special_tokens(special)
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    processor = FuyuProcessor(
        image_processor=FuyuImageProcessorPil(), tokenizer=PreTrainedTokenizerFast(tokenizer_object=library)
    )
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8))
    file = io.BytesIO()
    picture.save(file, "PNG")
    expected = processor(images=picture, text=f"{question}\n", return_tensors="pt")

    tokenizer = Tokenizer.from_folder(tmp_path)
    vision = VisionConfig(image_token_id=names.index("|SPEAKER|"))
    chat = Chat.fuyus(tokenizer, ImageTokens.of(vision, tokenizer))
    image = ImageReader(ImageSettings()).read(file.getvalue())
    prompt = chat.of_contents([("user", [image, question])])
    assert prompt.token_ids(tokenizer) == expected["input_ids"][0].tolist()
