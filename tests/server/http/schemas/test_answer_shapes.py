"""Answers have what OpenAI's API description requires, and its client's types read them strictly."""

import json
import typing
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import pytest
from msgspec import UnsetType
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from persimmon.model.config import PersimmonConfig
from persimmon.server.http.schemas import chat, completions, status, usage
from tests.server.http.fake_engine import ONLY_TEXT, FakeEngine, says
from tests.server.http.pooling import pools

pytestmark = pytest.mark.anyio

COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
TOOLS = [{"type": "function", "function": {"name": "find"}}]
CALL = '[{"name": "find", "arguments": {}}]'
EOS = 1
Tokens = Callable[[str], list[int]]

REQUIRED = {
    "chat.completion": {"id", "choices", "created", "model", "object"},
    "chat.completion.chunk": {"id", "choices", "created", "model", "object"},
    "text_completion": {"id", "choices", "created", "model", "object"},
    "list": {"data", "model", "object", "usage"},
}
"""By the answer's "object"; those of the parts below by the name of the field that holds them."""

REQUIRED_PARTS = {
    "choices": {"index", "finish_reason"},
    "message": {"role", "content", "refusal"},
    "logprobs": {"content", "refusal"},
    "content": {"token", "logprob", "bytes", "top_logprobs"},
    "top_logprobs": {"token", "logprob", "bytes"},
    "usage": {"prompt_tokens", "total_tokens"},
    "function": {"arguments"},
    "data": {"object", "index", "embedding"},
}


def lacks(name: str, node: Any) -> Iterator[str]:
    """The required fields that are not in an answer."""
    if isinstance(node, list):
        for child in node:
            yield from lacks(name, child)
    elif isinstance(node, dict):
        required = REQUIRED.get(str(node.get("object")), REQUIRED_PARTS.get(name, set()))
        yield from (f"{name}.{field}" for field in required - node.keys())
        for field, child in node.items():
            yield from lacks(field, child)


def check(kind: type[BaseModel], answer: dict[str, Any]) -> None:
    assert list(lacks("", answer)) == []
    kind.model_validate_json(json.dumps(answer), strict=True)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"n": 2},
        {"logprobs": True, "top_logprobs": 2},
        {"tools": TOOLS},
        {"tools": TOOLS, "tool_choice": "required"},
        {"service_tier": "auto"},
        {"max_tokens": 1},
    ],
)
@pytest.mark.parametrize("said", ["Hello!", CALL])
async def test_chats(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens, body: dict[str, Any], said: str
) -> None:
    engine.script = says(tokens(said), EOS)
    check(ChatCompletion, (await http.post(CHAT, json=ASK | body)).json())
    options = {"include_usage": True, "continuous_usage_stats": True}
    for more in ({}, {"stream_options": {"include_usage": True}}, {"stream_options": options}):
        response = await http.post(CHAT, json=ASK | body | {"stream": True} | more)
        for event in response.text.split("\n\n")[:-2]:
            check(ChatCompletionChunk, json.loads(event.removeprefix("data: ")))


async def test_completions(http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens) -> None:
    engine.script = says(tokens("Hello!"), EOS)
    for body in ({}, {"n": 2}, {"max_tokens": 1}):
        answer = (await http.post(COMPLETIONS, json={"prompt": "Hi"} | body)).json()
        assert all("text" in choice and "logprobs" in choice for choice in answer["choices"])
        check(Completion, answer)


async def test_embeddings(http: httpx.AsyncClient, engine: FakeEngine, config: PersimmonConfig) -> None:
    engine.script = pools(config.hidden_size)
    check(CreateEmbeddingResponse, (await http.post(EMBEDDINGS, json={"input": ["a", "b"]})).json())


async def test_usage_has_its_details(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = says([9], EOS, cached_tokens=1)
    usage = (await http.post(CHAT, json=ASK)).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1, "audio_tokens": 0}
    assert usage["completion_tokens_details"] == ONLY_TEXT


async def test_models(http: httpx.AsyncClient) -> None:
    for model in (await http.get("/v1/models")).json()["data"]:
        check(Model, model)


def test_what_may_be_left_out_is_not_documented_as_required() -> None:
    kinds = [kind for module in (chat, completions, status, usage) for kind in vars(module).values()]
    structs = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, msgspec.Struct)]
    assert chat.ChatCompletion in structs
    for kind in structs:
        for field in msgspec.structs.fields(kind):
            if UnsetType in typing.get_args(field.type):
                assert field.default is msgspec.UNSET, f"{kind.__name__}.{field.name}"
