"""`persimmon serve --model demo-vision` says what is in images."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.end_to_end.serving import Server, serving
from tools.train_vision_demo import Figure, picture

RED, GREEN, BLUE, YELLOW, BLACK = (220, 20, 30), (20, 150, 40), (30, 60, 230), (250, 220, 20), (20, 20, 20)
WHITE, LIGHT_GREY = (255, 255, 255), (225, 225, 225)


def figure(shape: str, color: tuple[int, ...], x: float, y: float, size: float) -> Figure:
    return Figure(shape=shape, color=color, center=(x, y), size=size)


# One is large, and made smaller by the server.
IMAGES = {
    "A red circle.": picture((100, 80), WHITE, [figure("circle", RED, 50, 42, 60)]),
    "A blue square.": picture((110, 80), LIGHT_GREY, [figure("square", BLUE, 60, 40, 50)], scale=2),
    "A green triangle.": picture((900, 750), WHITE, [figure("triangle", GREEN, 450, 400, 500)]),
    "A yellow circle left of a black square.": picture(
        (150, 100), WHITE, [figure("circle", YELLOW, 38, 50, 55), figure("square", BLACK, 110, 55, 50)]
    ),
    "A black triangle above a red circle.": picture(
        (110, 150), WHITE, [figure("triangle", BLACK, 55, 40, 55), figure("circle", RED, 60, 110, 55)]
    ),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--model", "demo-vision", "--kv-cache-memory", "32MB") as server:
        yield server


def ask(server: Server, *content: dict[str, Any]) -> str:
    body = {"messages": [{"role": "user", "content": list(content)}], "temperature": 0, "max_tokens": 30}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()
    return answer["choices"][0]["message"]["content"]


def image_part(image: Image.Image, kind: str) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, kind)
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("caption", IMAGES)
def test_the_demo_says_what_is_in_an_image(server: Server, caption: str, kind: str):
    part = image_part(IMAGES[caption], kind)
    assert ask(server, part, {"type": "text", "text": "Describe this image."}) == caption


def test_the_demo_asks_for_an_image_where_there_is_none(server: Server):
    assert ask(server, {"type": "text", "text": "Hello!"}) == "Send me an image of colored shapes."
