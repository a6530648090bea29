"""Boxes and points: tags of a prompt become the tokens that FuyuProcessor meant, tokens of an answer become tags."""

from pathlib import Path

import numpy as np
import pytest

from persimmon.model.coordinate_tags import CoordinateError, CoordinateTags
from persimmon.model.tokenizer import Tokenizer
from tests.fuyu import write_tokenizer


@pytest.fixture(scope="module")
def tags(tmp_path_factory: pytest.TempPathFactory) -> CoordinateTags:
    folder = tmp_path_factory.mktemp("fuyu")
    write_tokenizer(folder)
    found = CoordinateTags.of(Tokenizer.from_folder(folder))
    assert found is not None
    return found


def ids(tags: CoordinateTags, *pieces: str) -> tuple[int, ...]:
    found = [tags.tokenizer.token_id(piece) for piece in pieces]
    assert None not in found
    return tuple(found)  # type: ignore[arg-type]


def test_a_box_and_a_point_become_a_token_for_each_number(tags: CoordinateTags) -> None:
    parts = [*tags.split("find <box>0, 8, 4, 12</box> at <point> 18,2 </point>", scale=1.0)]
    assert parts == [
        "find ",
        ids(tags, "<0x00>", "0", "4", "2", "6", "<0x01>"),
        " at ",
        ids(tags, "<0x02>", "9", "1", "<0x03>"),
    ]


@pytest.mark.parametrize("scale", [1.0, 0.6, 0.5, 1080 / 2000, 1 / 3])
@pytest.mark.parametrize("corners", [(15, 3, 17, 5), (1, 7, 11, 13)])
def test_numbers_are_scaled_and_rounded_as_by_transformers(
    tags: CoordinateTags, corners: tuple[int, int, int, int], scale: float
) -> None:
    from transformers.models.fuyu.processing_fuyu import scale_bbox_to_transformed_image

    expected = scale_bbox_to_transformed_image(*map(float, corners), scale_factor=float(np.float32(scale)))
    (part,) = tags.split(f"<box>{', '.join(map(str, corners))}</box>", scale)
    assert part == ids(tags, "<0x00>", *map(str, expected), "<0x01>")


@pytest.mark.parametrize(
    "text",
    [
        "<box>1, 2, 3</box>",
        "<box>1, 2, 3, 4, 5</box>",
        "<box>1, 2, 3, x</box>",
        "<box>1, 2, 3, -4</box>",
        "<box>1, 2, 3, 4</point>",
        "<box>1, 2, 3, 4",
        "<point>1</point>",
        "<point></point>",
        "</box><box>",
    ],
)
def test_what_only_looks_like_a_tag_stays_text(tags: CoordinateTags, text: str) -> None:
    assert [*tags.split(text, 1.0)] == [text]


def test_a_number_without_a_token_is_an_error_that_says_which(tags: CoordinateTags) -> None:
    with pytest.raises(CoordinateError, match="the coordinate 99998 is 49999 "):
        list(tags.split("<point>4, 99998</point>", 1.0))


def test_tokens_become_tags_in_the_pixels_of_the_image(tags: CoordinateTags) -> None:
    answer = ids(tags, "<0x00>", "1", "2", "3", "4", "<0x01>", "<0x02>", "5", "6", "<0x03>")
    assert read(tags, answer, scale=1.0) == " <box>2, 4, 6, 8</box> <point>10, 12</point>"
    assert read(tags, answer, scale=0.4) == " <box>4, 10, 14, 20</box> <point>24, 30</point>"


def test_a_tag_comes_whole_or_not_at_all(tags: CoordinateTags) -> None:
    detokenizer = tags.detokenizer(1.0)
    deltas = [detokenizer.push((token_id,)) for token_id in ids(tags, "<0x02>", "5", "6", "<0x03>")]
    assert deltas == ["", "", "", " <point>10, 12</point>"]


@pytest.mark.parametrize(
    "pieces",
    [
        ("<0x00>", "1", "2", "3", "<0x01>"),
        ("<0x00>", "1", "2", "3", "4", "5", "<0x01>"),
        ("<0x00>", "1", "2", "3", "4", "<0x03>"),
        ("<0x02>", "5", "▁the", "<0x03>"),
        ("<0x02>", "5"),
        ("<0x01>", "5", "<0x00>"),
    ],
)
def test_tokens_that_are_no_tag_are_the_text_that_they_are(tags: CoordinateTags, pieces: tuple[str, ...]) -> None:
    token_ids = ids(tags, *pieces)
    assert read(tags, token_ids, 1.0) == tags.tokenizer.decode(token_ids)


def test_a_tag_may_begin_where_another_breaks_off(tags: CoordinateTags) -> None:
    assert read(tags, ids(tags, "<0x00>", "1", "<0x02>", "5", "6", "<0x03>"), 1.0) == "1 <point>10, 12</point>"


def read(tags: CoordinateTags, token_ids: tuple[int, ...], scale: float) -> str:
    """The text of an answer whose tokens come one by one."""
    detokenizer = tags.detokenizer(scale)
    return "".join([detokenizer.push((token_id,)) for token_id in token_ids]) + detokenizer.finish()


def test_a_vocabulary_without_these_tokens_has_no_tags(tmp_path: Path) -> None:
    class Nameless(Tokenizer):
        def token_id(self, name: str) -> int | None:
            return None

    write_tokenizer(tmp_path)
    assert CoordinateTags.of(Nameless.from_folder(tmp_path)) is None
