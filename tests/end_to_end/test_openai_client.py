"""What the official client makes of the running server: its exceptions, its helpers, its typed answers."""

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.end_to_end.serving import Server

CHAT = [{"role": "user", "content": "What does galaxy mean?"}]
PROMPT = "human: What does galaxy mean?\n\nadept:"
ENDLESS: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def client(demo: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "kind", "code", "param"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found", "model"),
        ({"max_tokens": 5000}, openai.BadRequestError, "context_length_exceeded", "max_tokens"),
        ({"temperature": 3}, openai.BadRequestError, None, "temperature"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "unknown_parameter", "temprature"),
        ({"messages": []}, openai.BadRequestError, None, "messages"),
    ],
)
def test_refusals_are_exceptions_that_say_what_is_wrong(demo, client, stream, fields, kind, code, param):
    asked = {"model": demo.name, "messages": CHAT} | fields
    with pytest.raises(kind) as raised:
        client.chat.completions.create(**asked, stream=stream)
    assert (raised.value.code, raised.value.param) == (code, param)
    assert raised.value.body["message"]


def test_asynchronous_calls_raise_the_same(demo):
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model="gpt-4", prompt="a")
            with pytest.raises(openai.BadRequestError):
                await client.completions.create(model=demo.name, prompt="a", n=0, stream=True)

    asyncio.run(main())


def test_an_impatient_client_gets_its_timeout_and_leaves_nothing_behind(demo, client):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).completions.create(model=demo.name, **ENDLESS)
    demo.wait_until_idle()


def test_a_stream_that_is_left_ends_on_the_server(demo, client):
    with client.completions.create(model=demo.name, **ENDLESS, stream=True) as stream:
        assert len(list(itertools.islice(stream, 3))) == 3
    demo.wait_until_idle()

    async def main() -> None:
        async with (
            openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0) as client,
            await client.completions.create(model=demo.name, **ENDLESS, stream=True) as stream,
        ):
            await anext(stream)

    asyncio.run(main())
    demo.wait_until_idle()


def test_nobody_at_the_address_is_a_connection_error():
    with (
        openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIConnectionError),
    ):
        client.models.list()


def test_the_stream_helper_gathers_the_answer_and_its_usage(demo, client):
    asked = {"model": demo.name, "messages": CHAT, "temperature": 0}
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    plain = client.chat.completions.create(**asked)
    assert "".join(deltas) == final.choices[0].message.content == plain.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"
    assert final.usage.completion_tokens == plain.usage.completion_tokens
    assert final.system_fingerprint == plain.system_fingerprint


def test_the_model_is_described(demo, client):
    model = client.models.retrieve(demo.name)
    assert (model.id, model.object, model.max_model_len) == (demo.name, "model", 2048)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("adept/other")


def test_log_probabilities_of_a_completion_cover_its_text(demo, client):
    asked = {"model": demo.name, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 3, "echo": True}
    choice = client.completions.create(**asked).choices[0]
    tokens = choice.logprobs
    assert choice.text.startswith(PROMPT)
    assert len(tokens.tokens) == len(tokens.token_logprobs) == len(tokens.top_logprobs) == len(tokens.text_offset)
    assert tokens.token_logprobs[0] is None
    for token, logprob, top in list(zip(tokens.tokens, tokens.token_logprobs, tokens.top_logprobs, strict=True))[-8:]:
        assert top[token] == logprob == max(top.values())
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    reported = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [offset for each in reported for offset in each.text_offset] == tokens.text_offset


def test_the_bytes_of_a_chats_tokens_are_its_answer(demo, client):
    asked = {"model": demo.name, "messages": CHAT, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    choice = client.chat.completions.create(**asked).choices[0]
    said = [token for token in choice.logprobs.content if token.bytes is not None]
    assert bytes(byte for token in said for byte in token.bytes).decode().strip() == choice.message.content
    assert all(token.logprob == token.top_logprobs[0].logprob for token in choice.logprobs.content)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    streamed = [chunk.choices[0].logprobs.content for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for each in streamed for token in each] == choice.logprobs.content


class Word(pydantic.BaseModel):
    """A word of a dictionary."""

    word: Literal["galaxy", "robot"]
    noun: bool


def test_structured_answers_are_parsed(demo, client):
    asked = {"model": demo.name, "messages": CHAT, "temperature": 0, "response_format": Word}
    parsed = client.chat.completions.parse(**asked).choices[0].message.parsed
    assert isinstance(parsed, Word)
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == parsed


def test_tool_calls_are_parsed_whole_and_streamed(demo, client):
    tools = [openai.pydantic_function_tool(Word, name="look_up")]
    asked = {"model": demo.name, "messages": CHAT, "temperature": 0, "tools": tools, "tool_choice": "required"}
    once = {"parallel_tool_calls": False}
    [call] = client.chat.completions.parse(**asked, **once).choices[0].message.tool_calls
    assert call.function.name == "look_up"
    assert isinstance(call.function.parsed_arguments, Word)
    with client.chat.completions.stream(**asked, **once) as stream:
        deltas = [event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"]
        [streamed] = stream.get_final_completion().choices[0].message.tool_calls
    assert "".join(deltas) == streamed.function.arguments == call.function.arguments
    assert streamed.function.parsed_arguments == call.function.parsed_arguments


def test_embeddings_are_the_same_numbers_in_both_encodings(demo, client):
    asked = {"model": demo.name, "input": ["galaxy", "robot"]}
    packed = client.embeddings.create(**asked)  # base64, which the client unpacks
    plain = client.embeddings.create(**asked, encoding_format="float")
    assert [each.index for each in packed.data] == [0, 1]
    assert [each.embedding for each in packed.data] == [pytest.approx(each.embedding) for each in plain.data]
    assert packed.data[0].embedding != packed.data[1].embedding
    assert packed.usage.prompt_tokens == packed.usage.total_tokens > 0
