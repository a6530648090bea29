"""The program that trained the vision demo."""

import re

import numpy as np

from tools.train_vision_demo import COLORS, MAX_SIDE, SHAPES, Example, Figure, Scenes, picture

FIGURE = f"an? ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
CAPTION = re.compile(f"{FIGURE}( (left of|above) {FIGURE})?[.]", re.IGNORECASE)


def samples(seed: int, count: int = 300) -> list[Example]:
    scenes = Scenes(seed)
    return [scenes.sample() for _ in range(count)]


def test_examples_repeat_with_their_seed_and_differ_between_seeds():
    first, again, other = samples(1), samples(1), samples(2)
    assert first == again
    assert not {each.image.tobytes() for each in first if each.image} & {
        each.image.tobytes() for each in other if each.image
    }


def test_captions_name_every_color_shape_and_relation_and_images_fit():
    examples = [each for each in samples(0) if each.image is not None]
    assert all(CAPTION.fullmatch(each.answer) for each in examples)
    assert all(max(each.image.size) <= MAX_SIDE for each in examples if each.image)
    words = {word for each in examples for word in re.findall(r"\w+", each.answer.lower())}
    assert words == {"a", "an", *COLORS, *SHAPES, "left", "of", "above"}
    assert "a orange" not in " ".join(each.answer.lower() for each in examples)


def test_without_an_image_the_answer_asks_for_one():
    without = [each for each in samples(0) if each.image is None]
    assert without
    assert all(each.answer.startswith("Send me an image") for each in without)


def test_shapes_are_drawn_where_they_are_said_to_be():
    for shape, share in (("square", 1.0), ("circle", np.pi / 4), ("triangle", 0.5)):
        figure = Figure(shape=shape, color=(0, 0, 0), center=(60, 40), size=50)
        drawn = np.asarray(picture((100, 80), (255, 255, 255), [figure], scale=3))[..., 0] < 128
        rows, columns = np.nonzero(drawn)
        assert abs(drawn.sum() / 2500 - share) < 0.04
        assert max(abs(rows.min() - 15), abs(rows.max() - 64), abs(columns.min() - 35), abs(columns.max() - 84)) <= 2
