"""Prompts that are shortened on request, as vLLM shortens them."""

from typing import Any

import httpx
import pytest

from persimmon.model.config import PersimmonConfig
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.client import EngineClient
from persimmon.server.http.app import create_app
from tests.server.http.fake_engine import MAX_MODEL_LEN, FakeEngine, says
from tests.server.http.pooling import pools

pytestmark = pytest.mark.anyio

COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
IDS = [5, 6, 7, 8, 9]
LONG = [5, 6, 7, 8] * MAX_MODEL_LEN


async def prompt(http: httpx.AsyncClient, engine: FakeEngine, path: str, **body: object) -> list[int]:
    """The token ids that the engine gets."""
    response = await http.post(path, json=body)
    assert response.status_code == 200, response.text
    submitted = engine.submitted[-1].token_ids
    assert response.json()["usage"]["prompt_tokens"] == len(submitted)
    return submitted


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, IDS),
        ({"truncate_prompt_tokens": 5}, IDS),
        ({"truncate_prompt_tokens": 2}, [8, 9]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "left"}, [8, 9]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, [5, 6]),
        ({"truncate_prompt_tokens": -1}, IDS),
        ({"truncation_side": "right"}, IDS),
    ],
)
async def test_the_last_tokens_of_a_prompt_are_kept_unless_the_first_are_asked_for(
    http: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], kept: list[int]
) -> None:
    engine.script = says([9])
    assert await prompt(http, engine, COMPLETIONS, prompt=IDS, **fields) == kept


@pytest.mark.parametrize(("fields", "answer"), [({}, 16), ({"max_tokens": 100}, 100)])
async def test_a_prompt_that_is_too_long_leaves_room_for_its_answer(
    http: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], answer: int
) -> None:
    engine.script = says([9] * 100)
    kept = await prompt(http, engine, COMPLETIONS, prompt=LONG, truncate_prompt_tokens=-1, **fields)
    assert kept == LONG[-(MAX_MODEL_LEN - answer) :]


async def test_a_text_keeps_its_first_token_where_the_request_does_not_say_where_to_cut(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.script = says([9])
    text = "a sweet fruit of the genus"
    begin, *ids = tokenizer.encode(text)
    assert begin == tokenizer.bos_token_id
    assert await prompt(http, engine, COMPLETIONS, prompt=text, truncate_prompt_tokens=3) == [begin, *ids[-2:]]
    assert await prompt(http, engine, COMPLETIONS, prompt=text, truncate_prompt_tokens=1) == [begin]
    left = {"truncate_prompt_tokens": 3, "truncation_side": "left"}
    assert await prompt(http, engine, COMPLETIONS, prompt=text, **left) == ids[-3:]


async def test_a_conversation_keeps_its_end(http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    engine.script = says([9])
    messages = [{"role": "user", "content": "What is a persimmon?"}]
    ids = tokenizer.encode("human: What is a persimmon?\n\nadept:")
    assert await prompt(http, engine, CHAT, messages=messages, max_tokens=1, truncate_prompt_tokens=4) == ids[-4:]


async def test_without_special_tokens_a_text_has_no_first_one(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.script = says([9])
    plain = tokenizer.encode("Hello", add_bos=False)
    assert await prompt(http, engine, COMPLETIONS, prompt="Hello", add_special_tokens=False) == plain
    messages = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.encode("human: Hi\n\nadept:")
    for given in (False, True):
        assert await prompt(http, engine, CHAT, messages=messages, max_tokens=1, add_special_tokens=given) == chat
        counted = (await http.post("/tokenize", json={"messages": messages, "add_special_tokens": given})).json()
        assert counted["tokens"] == chat


async def test_inputs_of_embeddings_keep_their_beginning(
    engine: FakeEngine, engine_client: EngineClient, tokenizer: Tokenizer, config: PersimmonConfig
) -> None:
    engine.script = pools(config.hidden_size)
    transport = httpx.ASGITransport(create_app(engine_client, tokenizer, config, "demo"))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
        assert await prompt(http, engine, EMBEDDINGS, input=IDS, truncate_prompt_tokens=2) == [5, 6]
        left = {"truncate_prompt_tokens": 2, "truncation_side": "left"}
        assert await prompt(http, engine, EMBEDDINGS, input=IDS, **left) == [8, 9]
        assert len(await prompt(http, engine, EMBEDDINGS, input=LONG, truncate_prompt_tokens=-1)) == MAX_MODEL_LEN


@pytest.mark.parametrize("keep", [0, -2, MAX_MODEL_LEN, 1.5])
async def test_a_length_that_cannot_be_is_refused(http: httpx.AsyncClient, engine: FakeEngine, keep: float) -> None:
    response = await http.post(COMPLETIONS, json={"prompt": IDS, "truncate_prompt_tokens": keep})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "truncate_prompt_tokens"
    assert engine.submitted == []
