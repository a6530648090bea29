import base64
import io
import json

import pytest
from PIL import Image

from benchmarks.vision import Measured, body, jpegs, summary, table


def test_images_differ_and_have_the_size_that_is_asked_for() -> None:
    files = jpegs(3, (48, 65), seed=0)
    assert len(set(files)) == 3
    assert [Image.open(io.BytesIO(file)).size for file in files] == [(65, 48)] * 3
    assert jpegs(1, (48, 65), seed=0) == files[:1]
    assert jpegs(1, (48, 65), seed=1) != files[:1]


def test_a_request_has_the_image_before_the_question() -> None:
    request = json.loads(body(b"image", tokens=5))
    image, text = request["messages"][0]["content"]
    assert base64.b64decode(image["image_url"]["url"].partition(",")[2]) == b"image"
    assert text["type"] == "text"
    assert (request["max_tokens"], request["ignore_eos"]) == (5, True)


def test_medians_are_compared_with_the_faster_way_of_transformers() -> None:
    measured = [
        Measured("persimmon", [100.0, 200.0], 6.0),
        Measured("persimmon", [150.0], 8.0),
        Measured("persimmon", [150.0], 7.0),
        Measured("Transformers, one by one", [600.0, 500.0, 700.0], 1.0),
        Measured("Transformers, batches of 8", None, 2.0),
    ]
    found = summary(measured, prepared_ms=15.0)
    assert found == {
        "images_per_s": 7.0,
        "transformers_images_per_s": 2.0,
        "images_ratio": 3.5,
        "ttft_ms": 150.0,
        "transformers_ttft_ms": 600.0,
        "ttft_ratio": 0.25,
        "preparation_ms": 15.0,
        "preparation_share": pytest.approx(0.1),
    }
    assert "| images/s | 7.0 | 2.0 | 3.5 |" in table(found)
