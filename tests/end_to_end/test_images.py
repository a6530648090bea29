"""Images through a whole server, by the official client and by batch files: Transformers' tokens, and refusals."""

import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from persimmon.model.tokenizer import Tokenizer
from tests.end_to_end.serving import Server, serving
from tests.fuyu import BOS, ImagePrompt, continue_greedily, load_transformers, make_fuyu

CACHE = ("--kv-cache-memory", "26MB")
NEW_TOKENS = 12
QUESTION = "What is this?"
PATCH = 30


def pixels(seed: int, rows: int = 3, columns: int = 5) -> np.ndarray:
    """[rows * PATCH, columns * PATCH, 3] uint8."""
    return np.random.default_rng(seed).integers(0, 256, (rows * PATCH, columns * PATCH, 3), dtype=np.uint8)


def patches(image: np.ndarray) -> np.ndarray:
    """[rows, columns, 2700] uint8."""
    rows = len(image) // PATCH
    return image.reshape(rows, PATCH, -1, PATCH, 3).swapaxes(1, 2).reshape(rows, -1, 2700)


def url(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def message(*images: np.ndarray, question: str = QUESTION) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url(image)}} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fuyu(tmp_path_factory.mktemp("fuyu"))


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    with serving("--model", str(checkpoint), *CACHE, "--allowed-media-domains", "localhost") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def asked(server: Server, *images: np.ndarray) -> dict[str, Any]:
    return {
        "model": server.name,
        "messages": [message(*images)],
        "temperature": 0,
        "max_tokens": NEW_TOKENS,
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }


def test_answers_are_transformers(client: openai.OpenAI, server: Server, checkpoint: Path) -> None:
    model, tokenizer = load_transformers(checkpoint), Tokenizer.from_folder(checkpoint)
    begin_of_answer = tokenizer.token_id("<0x04>")
    assert begin_of_answer is not None
    for images in ([pixels(1)], [pixels(2, rows=1), pixels(3, columns=1)]):
        parts = [part for image in images for part in (patches(image), [BOS])]
        text = tokenizer.encode_parts([f"{QUESTION}\n"], add_bos=False)
        expected = continue_greedily(model, ImagePrompt.of(*parts, [*text, begin_of_answer]), NEW_TOKENS)
        answer = client.chat.completions.create(**asked(server, *images))
        assert answer.choices[0].token_ids == expected


def test_a_stream_says_the_same_and_the_cache_knows_the_image(client: openai.OpenAI, server: Server) -> None:
    image = pixels(4, rows=12)
    plain = client.chat.completions.create(**asked(server, image))
    assert plain.usage is not None
    assert plain.usage.prompt_tokens_details is not None
    assert plain.usage.prompt_tokens_details.image_tokens == 12 * 6
    *chunks, last = client.chat.completions.create(
        **asked(server, image), stream=True, stream_options={"include_usage": True}
    )
    said = "".join([chunk.choices[0].delta.content or "" for chunk in chunks])
    assert said == plain.choices[0].message.content
    assert last.usage.prompt_tokens_details.cached_tokens == 64
    other = client.chat.completions.create(**asked(server, pixels(5, rows=12)))
    assert other.usage is not None
    assert other.usage.prompt_tokens_details is not None
    assert other.usage.prompt_tokens_details.cached_tokens == 0


def test_refusals_name_the_part(client: openai.OpenAI, server: Server) -> None:
    for given, words in (
        ("data:image/png;base64,AAAA", "not an image"),
        ("http://localhost/image.png", "is in a private network"),
        ("http://images.test/image.png", "this server fetches images only from localhost"),
    ):
        bad = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": given}}]}
        with pytest.raises(openai.BadRequestError, match=words) as raised:
            client.chat.completions.create(model=server.name, messages=[bad])  # type: ignore[list-item]
        assert raised.value.param == "messages[0].content[0]"


def test_texts_alone_work_too(client: openai.OpenAI, server: Server) -> None:
    chat = client.chat.completions.create(
        model=server.name, messages=[{"role": "user", "content": "Hello"}], max_tokens=4
    )
    assert chat.usage is not None
    completion = client.completions.create(model=server.name, prompt="Hello", max_tokens=4)
    assert completion.usage is not None
    assert chat.usage.completion_tokens > 0
    assert completion.usage.completion_tokens > 0


def test_the_request_that_is_printed_at_the_start_has_an_image(server: Server) -> None:
    command = server.wait_for_line(re.compile(r"curl (\S+) -H 'Content-Type: application/json' -d '(.*)'$"), 20)
    body = json.loads(command[2]) | {"max_tokens": 4}
    answer = httpx.post(command[1], json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens_details"]["image_tokens"] == 6


def test_embeddings_see_images(server: Server) -> None:
    first, again, other = (
        httpx.post(f"{server.url}/v1/embeddings", json={"messages": [message(pixels(seed))]}, timeout=60).json()
        for seed in (1, 1, 2)
    )
    assert first["data"] == again["data"]
    assert first["data"] != other["data"]


def test_a_batch_file_may_hold_images(client: openai.OpenAI, server: Server, checkpoint: Path, tmp_path: Path) -> None:
    body = {"messages": [message(pixels(1))], "temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
    line = {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": body}
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(line) + "\n")
    command = [sys.executable, "-m", "persimmon.server.cli", "generate", str(source), str(out)]
    ran = subprocess.run([*command, "--model", str(checkpoint), *CACHE], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(out.read_text())["response"]["body"]
    live = client.chat.completions.create(**asked(server, pixels(1)))
    assert answer["choices"][0]["message"]["content"] == live.choices[0].message.content


def test_a_checkpoint_that_prepares_images_in_another_way_is_refused_at_the_start(
    checkpoint: Path, tmp_path: Path
) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    preprocessor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor | {"do_normalize": False}))
    command = [sys.executable, "-m", "persimmon.server.cli", "serve", "--port", "0", "--model", str(tmp_path), *CACHE]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2
    assert "do_normalize" in ran.stderr
