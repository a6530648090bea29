"""LiteLLM, as a library and so as its proxy, which calls the same functions."""

import asyncio
from typing import Any

import httpx
import litellm
import pytest

from tests.end_to_end.serving import Server

CHAT = [{"role": "user", "content": "What does galaxy mean?"}]
PROMPT = "human: What does galaxy mean?\n\nadept:"


@pytest.fixture
def ask(demo: Server) -> dict[str, Any]:
    """What every call of a chat says."""
    return {
        "model": f"hosted_vllm/{demo.name}",
        "api_base": f"{demo.url}/v1",
        "api_key": "none",
        "messages": CHAT,
        "temperature": 0,
        "num_retries": 0,
    }


@pytest.fixture
def answer(demo: Server) -> str:
    """What the server says to CHAT when it is asked without LiteLLM."""
    response = httpx.post(f"{demo.url}/v1/chat/completions", json={"messages": CHAT, "temperature": 0}, timeout=60)
    text: str = response.json()["choices"][0]["message"]["content"]
    assert text.startswith('"Galaxy" is a noun.')
    return text


@pytest.mark.parametrize("provider", ["hosted_vllm", "openai"])
def test_a_chat(demo: Server, ask: dict[str, Any], answer: str, provider: str) -> None:
    response = litellm.completion(**ask | {"model": f"{provider}/{demo.name}"})
    [choice] = response.choices
    assert choice.message.content == answer
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert response.usage.total_tokens == response.usage.prompt_tokens + response.usage.completion_tokens


def test_a_stream_builds_the_same_answer_with_its_usage(ask: dict[str, Any], answer: str) -> None:
    plain = litellm.completion(**ask)
    chunks = list(litellm.completion(**ask, stream=True, stream_options={"include_usage": True}))
    built = litellm.stream_chunk_builder(chunks, messages=CHAT)
    assert built.choices[0].message.content == answer
    assert built.choices[0].finish_reason == "stop"
    assert built.usage.completion_tokens == plain.usage.completion_tokens
    assert built.usage.prompt_tokens == plain.usage.prompt_tokens


def test_asynchronous_chats_and_streams(ask: dict[str, Any], answer: str) -> None:
    async def streamed() -> str:
        stream = await litellm.acompletion(**ask, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def main() -> list[str]:
        plain = [litellm.acompletion(**ask) for _ in range(3)]
        streams = asyncio.gather(*(streamed() for _ in range(3)))
        return [each.choices[0].message.content for each in await asyncio.gather(*plain)] + await streams

    assert asyncio.run(main()) == [answer] * 6


def test_samplings_fields_reach_the_server(ask: dict[str, Any]) -> None:
    drawn = ask | {"temperature": 1.5, "seed": 11, "n": 4, "max_tokens": 24, "min_p": 0.001}
    first = [choice.message.content for choice in litellm.completion(**drawn).choices]
    assert first == [choice.message.content for choice in litellm.completion(**drawn).choices]
    assert len(set(first)) > 1
    best = {choice.message.content for choice in litellm.completion(**drawn, top_k=1).choices}
    assert best == {litellm.completion(**ask, max_tokens=24).choices[0].message.content}
    stopped = litellm.completion(**ask, stop=["noun"]).choices[0]
    assert stopped.message.content == '"Galaxy" is a '
    assert stopped.finish_reason == "stop"


def test_a_text_completion_and_its_stream(demo: Server, ask: dict[str, Any]) -> None:
    asked = ask | {"model": f"text-completion-openai/{demo.name}", "prompt": PROMPT, "max_tokens": 12}
    del asked["messages"]
    plain = litellm.text_completion(**asked)
    assert plain.choices[0].text.startswith(' "Galaxy" is a noun.')
    assert plain.choices[0].finish_reason == "length"
    chunks = list(litellm.text_completion(**asked, stream=True))
    assert "".join(chunk.choices[0].text or "" for chunk in chunks) == plain.choices[0].text


def test_logprobs_come_through(ask: dict[str, Any]) -> None:
    response = litellm.completion(**ask, max_tokens=4, logprobs=True, top_logprobs=2)
    tokens = response.choices[0].logprobs.content
    assert len(tokens) == 4
    for token in tokens:
        assert len(token.top_logprobs) == 2
        assert token.logprob == token.top_logprobs[0].logprob <= 0


def test_structured_output_comes_through(ask: dict[str, Any]) -> None:
    schema = {
        "type": "object",
        "properties": {"noun": {"type": "boolean"}},
        "required": ["noun"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "word", "schema": schema, "strict": True}}
    response = litellm.completion(**ask, response_format=form, max_tokens=40)
    assert response.choices[0].message.content in (
        '{"noun":true}',
        '{"noun": true}',
        '{"noun":false}',
        '{"noun": false}',
    )


def test_a_forced_tool_call_comes_through(demo: Server, ask: dict[str, Any]) -> None:
    parameters = {
        "type": "object",
        "properties": {"word": {"enum": ["galaxy", "robot"]}},
        "required": ["word"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": parameters}}]
    choice = {"type": "function", "function": {"name": "look_up"}}
    # For hosted_vllm LiteLLM takes additionalProperties out of the parameters, and then there are no wrong arguments.
    asked = ask | {"model": f"openai/{demo.name}", "tools": tools, "tool_choice": choice, "max_tokens": 40}
    [call] = litellm.completion(**asked).choices[0].message.tool_calls
    assert call.function.name == "look_up"
    assert call.function.arguments in (
        '{"word":"galaxy"}',
        '{"word": "galaxy"}',
        '{"word":"robot"}',
        '{"word": "robot"}',
    )


def test_embeddings_come_through(demo: Server, ask: dict[str, Any]) -> None:
    response = litellm.embedding(
        model=ask["model"], input=["galaxy", "robot"], api_base=ask["api_base"], api_key="none", num_retries=0
    )
    assert [len(each["embedding"]) for each in response.data] == [256, 256]


def test_errors_become_litellms_own(demo: Server, ask: dict[str, Any]) -> None:
    with pytest.raises(litellm.NotFoundError, match="does not exist"):
        litellm.completion(**ask | {"model": "hosted_vllm/gpt-4"})
    with pytest.raises(litellm.ContextWindowExceededError, match="maximum context length is 2048 tokens"):
        litellm.completion(**ask | {"messages": [{"role": "user", "content": "a word " * 3000}]})
    with pytest.raises(litellm.BadRequestError, match="'temperature'"):
        litellm.completion(**ask | {"temperature": 3})
    with pytest.raises(litellm.BadRequestError, match="'temperature'"):
        litellm.completion(**ask | {"temperature": 3}, stream=True)


@pytest.mark.parametrize("provider", ["hosted_vllm", "openai"])
def test_an_image(fuyu: Server, picture: str, provider: str) -> None:
    parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "What is this?"}]
    ask = {
        "model": f"{provider}/{fuyu.name}",
        "api_base": f"{fuyu.url}/v1",
        "api_key": "none",
        "messages": [{"role": "user", "content": parts}],
        "temperature": 0,
        "max_tokens": 6,
        "num_retries": 0,
    }
    plain = litellm.completion(**ask)
    assert plain.usage.prompt_tokens_details.image_tokens == 8
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ask, stream=True))
    assert streamed == plain.choices[0].message.content
