"""Images in conversations, on a fake engine: what it is asked, what comes back, and what is refused."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from persimmon.model.config import PersimmonConfig
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.client import EngineClient, SequenceStream
from persimmon.server.engine.messages import Submit
from persimmon.server.http.middleware import observer
from persimmon.server.http.middleware.access import Access
from tests.fuyu import BOS, NEWLINE, SPEAKER
from tests.server.http.conftest import LiveServer
from tests.server.http.fake_engine import MAX_MODEL_LEN, FakeEngine, says
from tests.server.http.images import (
    Urls,
    app_with_images,
    data_url,
    loader,
    part,
    png,
    row_pixels,
    serving_images,
    text,
    tokenizer_in,
    user,
)
from tests.server.http.pooling import pools
from tests.server.http.raw import listening
from tests.server.http.transport.test_disconnect import request

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
EOS = 1
SMALL = png(4, 6)
"""Two rows of three patches."""


@pytest.fixture(scope="module")
def fuyus(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_in(tmp_path_factory.mktemp("fuyu"))


@pytest.fixture
async def vision(
    engine_client: EngineClient, fuyus: Tokenizer, config: PersimmonConfig
) -> AsyncIterator[httpx.AsyncClient]:
    async with serving_images(engine_client, fuyus, config) as client:
        yield client


@pytest.fixture
def ids(fuyus: Tokenizer) -> Callable[[str], list[int]]:
    return lambda content: fuyus.encode_parts([content], add_bos=False)


def named(fuyus: Tokenizer, *names: str) -> list[int]:
    found = [fuyus.token_id(name) for name in names]
    assert None not in found
    return found  # type: ignore[return-value]


async def ask(http: httpx.AsyncClient, *messages: dict[str, Any], **body: object) -> dict[str, Any]:
    response = await http.post(CHAT, json={"messages": messages, "max_tokens": 50, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def refusal(http: httpx.AsyncClient, *messages: dict[str, Any], **body: object) -> dict[str, Any]:
    response = await http.post(CHAT, json={"messages": messages, "max_tokens": 50, **body})
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


async def test_an_image_goes_to_the_engine_in_rows_with_their_pixels(
    vision: httpx.AsyncClient, engine: FakeEngine, fuyus: Tokenizer, ids: Callable[[str], list[int]]
) -> None:
    engine.script = says(ids("A dot."), EOS, cached_tokens=3)
    answer = await ask(vision, user(part(SMALL), text("What is this?")))
    assert answer["choices"][0]["message"]["content"] == "A dot."
    [sample] = engine.submitted
    image = [*[SPEAKER] * 3, NEWLINE] * 2
    prompt = [*image, BOS, *ids("What is this?\n"), *named(fuyus, "<0x04>")]
    assert sample.token_ids == prompt
    assert [(span.start, span.length, span.pixels) for span in sample.whole.spans] == [
        (4 * row, 3, pixels) for row, pixels in enumerate(row_pixels(4, 6))
    ]
    assert len({span.content for span in sample.whole.spans}) == 2
    assert all(len(span.content) == 16 for span in sample.whole.spans)
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 3, "audio_tokens": 0, "image_tokens": 8}


async def test_several_images_in_several_messages(
    vision: httpx.AsyncClient, engine: FakeEngine, ids: Callable[[str], list[int]]
) -> None:
    engine.script = says([9])
    answer = await ask(
        vision,
        {"role": "system", "content": [text("One is"), part(png(2, 2, seed=1))]},
        user(part(SMALL), part(png(2, 4, seed=2))),
        {"role": "assistant", "content": "Yes."},
        user(text("Sure?")),
    )
    [sample] = engine.submitted
    assert [(span.length, span.pixels) for span in sample.whole.spans] == [
        (1, row_pixels(2, 2, seed=1)[0]),
        *((3, row) for row in row_pixels(4, 6)),
        (2, row_pixels(2, 4, seed=2)[0]),
    ]
    for span in sample.whole.spans:
        assert sample.token_ids[span.start : span.start + span.length] == [SPEAKER] * span.length
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == 2 + 8 + 3


async def test_a_stream_with_its_usage(
    vision: httpx.AsyncClient, engine: FakeEngine, ids: Callable[[str], list[int]]
) -> None:
    engine.script = says(ids("A dot."), EOS)
    body = {"messages": [user(part(SMALL))], "stream": True, "stream_options": {"include_usage": True}, "n": 2}
    answer = await vision.post(CHAT, json=body)
    events = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line and "[DONE]" not in line]
    said = ["", ""]
    for event in events:
        for choice in event["choices"]:
            said[choice["index"]] += choice["delta"].get("content") or ""
    assert said == ["A dot.", "A dot."]
    assert events[-1]["usage"]["prompt_tokens_details"]["image_tokens"] == 8
    assert len({id(sample.whole) for sample in engine.submitted}) == 1


@pytest.mark.parametrize(
    "image",
    [
        part(SMALL) | {"image_url": {"url": data_url(SMALL), "detail": "low"}},
        {"type": "image_url", "image_url": data_url(SMALL)},
        {"type": "input_image", "image_url": data_url(SMALL), "detail": "auto"},
        part(data_url(SMALL).replace("image/png", "image/jpeg")),
        part(data_url(SMALL).replace("data:image/png", "DATA:")),
        part("\n".join([data_url(SMALL)[:40], data_url(SMALL)[40:]])),
        part(SMALL) | {"cache_control": {"type": "ephemeral"}},
    ],
)
async def test_the_forms_that_clients_send(
    vision: httpx.AsyncClient, engine: FakeEngine, image: dict[str, Any]
) -> None:
    engine.script = says([9])
    await ask(vision, user(image, text("Hi")))
    assert [span.pixels for span in engine.submitted[0].whole.spans] == row_pixels(4, 6)


async def test_a_conversation_of_texts_has_no_spans_and_no_image_tokens(
    vision: httpx.AsyncClient, engine: FakeEngine, ids: Callable[[str], list[int]]
) -> None:
    engine.script = says([9])
    answer = await ask(vision, user(text("Hi"), text("there")))
    assert engine.submitted[0].whole.spans == []
    assert engine.submitted[0].token_ids[:-1] == [BOS, *ids("Hi\nthere\n")]
    assert "image_tokens" not in answer["usage"]["prompt_tokens_details"]


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        (
            user(part(b"no image")),
            "messages[0].content[0]",
            "not an image in one of the formats",
        ),
        (user(text("a"), part(SMALL[:60])), "messages[0].content[1]", "is damaged"),
        (user(part("data:image/png;base64,a?b=")), "messages[0].content[0]", "the base64 in its data: URL is damaged"),
        (user(part("data:image/png,abc")), "messages[0].content[0]", "does not hold base64"),
        (user(part("data:")), "messages[0].content[0]", "does not hold base64"),
        (user(part(data_url(b"x" * 20_000))), "messages[0].content[0]", "expected at most 10,000"),
        (user(part("picture.png")), "messages[0].content[0]", "must be a data: URL"),
        (user(part("file:///etc/passwd")), "messages[0].content[0]", "must be a data: URL"),
        (user(part("https://images.test/a.png")), "messages[0].content[0]", "--allowed-media-domains is not set"),
        (user({"type": "image_url"}), "messages[0].content[0].image_url", "Missing required parameter"),
        (user({"type": "image_url", "image_url": 5}), "messages[0].content[0].image_url", "it must be an object"),
        (user({"type": "image_url", "image_url": {}}), "messages[0].content[0].image_url.url", "Missing required"),
        (user({"type": "image_url", "image_url": {"url": 5}}), "messages[0].content[0].image_url.url", "a string"),
        (
            user({"type": "image_url", "image_url": {"url": "a", "b": 1}}),
            "messages[0].content[0].image_url.b",
            "Unknown parameter",
        ),
        (
            {"role": "assistant", "content": [text("a"), part(SMALL)]},
            "messages[0].content[1]",
            "only user and system messages may have images",
        ),
        (
            {"role": "tool", "tool_call_id": "x", "content": [part(SMALL)]},
            "messages[0].content[0]",
            "only user and system messages may have images",
        ),
    ],
)
async def test_what_is_no_image_is_refused_by_its_place(
    vision: httpx.AsyncClient, message: dict[str, Any], param: str, words: str
) -> None:
    error = await refusal(vision, message, {"role": "user", "content": "Hi"})
    assert error["param"] == param
    assert words in error["message"]


async def test_a_model_without_images_refuses_them_by_their_place(http: httpx.AsyncClient) -> None:
    for path in (CHAT, "/tokenize", "/v1/embeddings"):
        response = await http.post(path, json={"messages": [user(text("Hi"), part(SMALL))]})
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["code"]) == ("messages[0].content[1].type", "unsupported_parameter")


async def test_images_that_are_too_many_for_the_context(vision: httpx.AsyncClient, engine: FakeEngine) -> None:
    largest = part(png(20, 40))  # 10 rows of 20 patches and a newline
    error = await refusal(vision, user(*[largest] * 11))
    assert error["code"] == "context_length_exceeded"
    assert "the images of this request alone take more" in error["message"]
    error = await refusal(vision, user(*[part(png(2, 2))] * (MAX_MODEL_LEN // 3 + 1)))
    assert error["code"] == "context_length_exceeded"
    error = await refusal(vision, user(*[largest] * 9, text("word " * 200)))
    assert error["code"] == "context_length_exceeded"
    assert f"of which {9 * 210} are of images" in error["message"]
    assert engine.submitted == []


async def test_the_operator_may_limit_images(
    engine_client: EngineClient, engine: FakeEngine, fuyus: Tokenizer, config: PersimmonConfig
) -> None:
    engine.script = says([9])
    async with serving_images(engine_client, fuyus, config, images=loader(max_images=1)) as http:
        await ask(http, user(part(SMALL)))
        error = await refusal(http, user(part(SMALL)), user(part(SMALL)))
    assert error["message"] == (
        "'messages' has 2 images; a request to this server may have at most 1 (--limit-mm-per-prompt)."
    )


async def test_a_prompt_with_images_is_not_cut(vision: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = says([9])
    message = user(part(SMALL), text("Hi"))
    error = await refusal(vision, message, truncate_prompt_tokens=5)
    assert error["param"] == "truncate_prompt_tokens"
    await ask(vision, message, truncate_prompt_tokens=100)
    answer = await vision.post("/v1/embeddings", json={"messages": [message], "truncate_prompt_tokens": 5})
    assert answer.json()["error"]["param"] == "truncate_prompt_tokens"


async def test_tokenize_shows_the_tokens_of_images(vision: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = says([9])
    messages = [user(part(SMALL), text("Hi"))]
    await ask(vision, *messages)
    answer = await vision.post("/tokenize", json={"messages": messages, "return_token_strs": True})
    assert answer.json()["tokens"] == engine.submitted[0].token_ids
    assert answer.json()["token_strs"][:5] == ["|SPEAKER|"] * 3 + ["|NEWLINE|", "|SPEAKER|"]


async def test_boxes_and_points_are_tokens_for_the_model_and_tags_for_clients(
    vision: httpx.AsyncClient, engine: FakeEngine, fuyus: Tokenizer, ids: Callable[[str], list[int]]
) -> None:
    box = named(fuyus, "<0x00>", "1", "2", "3", "4", "<0x01>")
    engine.script = says([*ids("Here"), *box, *ids("and")], EOS)
    message = user(part(png(8, 80)), text("What is at <point>8, 12</point>?"))  # made half as large
    answer = await ask(vision, message, logprobs=False)
    assert answer["choices"][0]["message"]["content"] == "Here <box>4, 8, 12, 16</box> and"
    point = named(fuyus, "<0x02>", "2", "3", "<0x03>")
    token_ids = engine.submitted[0].token_ids
    assert token_ids[-len(ids("?\n")) - 5 :] == [*point, *ids("?\n"), *named(fuyus, "<0x04>")]
    streamed = await vision.post(CHAT, json={"messages": [message], "stream": True})
    pieces = [json.loads(line[6:])["choices"] for line in streamed.text.split("\n\n") if line and "[DONE]" not in line]
    contents = [choice["delta"].get("content", "") for choices in pieces for choice in choices]
    assert any(" <box>4, 8, 12, 16</box>" in content for content in contents)


async def test_a_coordinate_without_a_token_is_refused(vision: httpx.AsyncClient) -> None:
    error = await refusal(vision, user(part(SMALL), text("<point>2, 98765</point>")))
    assert error["param"] == "messages"
    assert "the coordinate 98765" in error["message"]


async def test_tools_and_forms_of_answers_go_with_images(
    vision: httpx.AsyncClient, engine: FakeEngine, ids: Callable[[str], list[int]], fuyus: Tokenizer
) -> None:
    find = {"type": "function", "function": {"name": "find"}}
    engine.script = says(ids('[{"name": "find", "arguments": {}}]'), EOS)
    answer = await ask(vision, user(part(SMALL), text("Find it.")), tools=[find])
    [call] = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "find", "arguments": "{}"}
    [sample] = engine.submitted
    before = fuyus.decode(sample.token_ids[: sample.whole.spans[0].start], from_start=True)
    assert before.startswith("You can call these functions")
    choice = {"type": "function", "function": {"name": "find"}}
    engine.script = says(ids("{}}]"), EOS)
    answer = await ask(vision, user(part(SMALL)), tools=[find], tool_choice=choice)
    [call] = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "find"
    begun = fuyus.decode(engine.submitted[1].token_ids)
    assert begun.endswith(' [{"name": "find", "arguments":')


async def test_embeddings_of_a_conversation_with_an_image(
    vision: httpx.AsyncClient, engine: FakeEngine, config: PersimmonConfig, ids: Callable[[str], list[int]]
) -> None:
    engine.script = pools(config.hidden_size)
    messages = [user(part(SMALL), text("Hi"))]
    answer = await vision.post("/v1/embeddings", json={"messages": messages})
    assert answer.status_code == 200, answer.text
    [sample] = engine.submitted
    prompt = [*[*[SPEAKER] * 3, NEWLINE] * 2, BOS, *ids("Hi\n")]
    assert sample.token_ids == prompt
    assert [span.pixels for span in sample.whole.spans] == row_pixels(4, 6)
    assert answer.json()["usage"]["prompt_tokens"] == len(prompt)
    begun = await vision.post("/v1/embeddings", json={"messages": messages, "add_generation_prompt": True})
    assert begun.status_code == 200
    assert len(engine.submitted[1].token_ids) == len(prompt) + 1


async def test_the_model_list_says_what_a_model_reads(vision: httpx.AsyncClient, http: httpx.AsyncClient) -> None:
    for client, modalities in ((vision, ["text", "image"]), (http, ["text"])):
        [model] = (await client.get("/v1/models")).json()["data"]
        assert model["input_modalities"] == modalities


async def test_metrics_count_images_and_their_tokens(vision: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = says([9])
    await ask(vision, user(part(SMALL), part(png(2, 2))))
    metrics = (await vision.get("/metrics")).text.splitlines()
    assert "persimmon_images_total 2.0" in metrics
    assert "persimmon_image_tokens_total 10.0" in metrics
    assert "persimmon_image_load_seconds_count 1.0" in metrics


@pytest.mark.parametrize("log_prompts", [False, True])
async def test_logs_never_hold_an_image(
    engine_client: EngineClient,
    engine: FakeEngine,
    fuyus: Tokenizer,
    config: PersimmonConfig,
    caplog: pytest.LogCaptureFixture,
    log_prompts: bool,
) -> None:
    caplog.set_level(logging.INFO, observer.__name__)
    engine.script = says([9])
    async with serving_images(engine_client, fuyus, config, access=Access(log_prompts=log_prompts)) as http:
        await ask(http, user(part(SMALL), text("Hello")))
        await refusal(http, user(part("https://secret.test/a?signature=b")))
    lines = [str(vars(record)) for record in caplog.records]
    assert len(lines) == 2
    assert ("<image 6x4>Hello" in lines[0]) == log_prompts
    assert not any("base64" in line or "signature" in line for line in lines)


async def test_the_pixels_of_an_image_are_forgotten_when_the_engine_has_them(
    vision: httpx.AsyncClient, engine: FakeEngine, engine_client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Submit] = []
    submit = engine_client.submit

    def watched(whole: Submit) -> AbstractContextManager[list[SequenceStream]]:
        sent.append(whole)
        return submit(whole)

    monkeypatch.setattr(engine_client, "submit", watched)
    engine.script = says([9])
    await ask(vision, user(part(SMALL)))
    assert len(engine.submitted[0].whole.spans) == 2
    assert sent[0].spans == []


async def test_a_text_may_not_spell_the_placeholder_of_a_patch_next_to_an_image(
    engine_client: EngineClient, config: PersimmonConfig, tmp_path: Path
) -> None:
    tokenizer_in(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] &= token["content"] != "|SPEAKER|"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    async with serving_images(engine_client, Tokenizer.from_folder(tmp_path), config) as http:
        error = await refusal(http, user(part(SMALL), text("a |SPEAKER| b")))
    assert error["param"] == "messages"
    assert "spells the token that stands for a part of an image" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_has_its_answer_aborted(
    engine_client: EngineClient, engine: FakeEngine, fuyus: Tokenizer, config: PersimmonConfig, stream: bool
) -> None:
    async with listening(app_with_images(engine_client, fuyus, config)) as address:
        async with request(LiveServer(*address), CHAT, messages=[user(part(SMALL))], stream=stream):
            [sample] = await engine.submissions(1)
        assert await engine.aborts(1) == [sample.sequence_id]


async def test_a_client_that_leaves_ends_the_fetching_of_its_image(
    engine_client: EngineClient, engine: FakeEngine, fuyus: Tokenizer, config: PersimmonConfig
) -> None:
    urls = Urls()
    async with listening(app_with_images(engine_client, fuyus, config, images=loader(fetcher=urls))) as address:
        async with request(LiveServer(*address), CHAT, messages=[user(part("http://a.test/1"))]):
            await urls.until_asked(1)
        async with asyncio.timeout(20):
            await urls.ended.wait()
    assert urls.cancelled == ["http://a.test/1"]
    assert engine.submitted == []
