"""The official client against the app, over TCP."""

import asyncio
from collections.abc import AsyncIterator, Callable

import openai
import pytest

from persimmon.server.engine.messages import SequenceOutput
from tests.server.http.conftest import LiveServer
from tests.server.http.fake_engine import FakeEngine, Sample, outputs, says

pytestmark = pytest.mark.anyio

EOS = 1
Tokens = Callable[[str], list[int]]


@pytest.fixture
async def client(server: LiveServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_a_completion(client: openai.AsyncOpenAI, engine: FakeEngine, tokens: Tokens) -> None:
    engine.script = says(tokens("a sweet fruit"), EOS)
    answer = await client.completions.create(
        model="demo", prompt="What is it?", max_tokens=50, temperature=0, extra_body={"top_k": 5, "ignore_eos": False}
    )
    assert answer.choices[0].text == " a sweet fruit"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(tokens("a sweet fruit")) + 1


async def test_a_completion_stream(client: openai.AsyncOpenAI, engine: FakeEngine, tokens: Tokens) -> None:
    engine.script = says(tokens("a sweet fruit"), EOS)
    stream = await client.completions.create(
        model="demo", prompt="?", max_tokens=50, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == " a sweet fruit"
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.prompt_tokens_details is not None


async def test_a_conversation(client: openai.AsyncOpenAI, engine: FakeEngine, tokens: Tokens) -> None:
    engine.script = says(tokens("Hello!"), EOS)
    first = await client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "Hi"}])
    assert first.choices[0].message.content == "Hello!"
    second = await client.chat.completions.create(
        model="demo",
        messages=[
            {"role": "user", "content": "Hi"},
            first.choices[0].message.model_dump(),  # type: ignore[list-item]  # as people do
            {"role": "user", "content": "Again"},
        ],
    )
    assert second.choices[0].finish_reason == "stop"
    assert engine.submitted[1].token_ids == [1, *tokens("human: Hi\n\nadept: Hello!\n\nhuman: Again\n\nadept:")]


async def test_a_chat_stream(client: openai.AsyncOpenAI, engine: FakeEngine, tokens: Tokens) -> None:
    engine.script = says(tokens("Hello you!"), EOS)
    async with client.chat.completions.stream(model="demo", messages=[{"role": "user", "content": "Hi"}]) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "Hello you!"
    assert final.choices[0].message.role == "assistant"
    assert final.choices[0].finish_reason == "stop"


async def test_the_synchronous_client(server: LiveServer, engine: FakeEngine, tokens: Tokens) -> None:
    engine.script = says(tokens("Hello!"), EOS)

    def talk() -> tuple[str | None, str, list[str]]:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            [model] = client.models.list()
            ask: dict = {"model": model.id, "messages": [{"role": "user", "content": "Hi"}]}
            whole = client.chat.completions.create(**ask)
            chunks = list(client.chat.completions.create(**ask, stream=True))
            texts = [choice.text for choice in client.completions.create(model=model.id, prompt=["a", "b"]).choices]
            return whole.choices[0].message.content, "".join(c.choices[0].delta.content or "" for c in chunks), texts

    assert await asyncio.to_thread(talk) == ("Hello!", "Hello!", [" Hello!", " Hello!"])


async def test_errors_become_the_clients_own(client: openai.AsyncOpenAI, engine: FakeEngine, tokens: Tokens) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        await client.completions.create(model="other", prompt="Hello")
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        await client.completions.create(model="demo", prompt=[5] * 3000)
    assert too_long.value.code == "context_length_exceeded"
    assert too_long.value.param == "prompt"
    engine.script = lambda submit: [SequenceOutput(submit.sequence_id, tokens("yes"))]
    stream = await client.completions.create(model="demo", prompt="Hello", stream=True)
    assert (await anext(stream)).choices[0].text == " yes"
    await engine.send_output(SequenceOutput(engine.submitted[-1].sequence_id, [], "error", error="It broke."))
    with pytest.raises(openai.APIError, match="It broke"):
        await anext(stream)


async def test_a_closed_stream_aborts_its_sequence(
    client: openai.AsyncOpenAI, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = lambda submit: [SequenceOutput(submit.sequence_id, tokens("yes"))]
    stream = await client.completions.create(model="demo", prompt="Hello", stream=True)
    await anext(stream)
    await stream.close()
    assert await engine.aborts(1) == [engine.submitted[0].sequence_id]


async def test_many_concurrent_requests_all_get_their_own_answer(
    client: openai.AsyncOpenAI, engine: FakeEngine, tokens: Tokens
) -> None:
    def script(submit: Sample) -> list[SequenceOutput]:
        return outputs(submit.sequence_id, [[token] for token in tokens(f"number {submit.token_ids[0]}")])

    engine.script = script

    async def ask(number: int) -> str:
        if number % 2:
            return (await client.completions.create(model="demo", prompt=[number], max_tokens=50)).choices[0].text
        stream = await client.completions.create(model="demo", prompt=[number], max_tokens=50, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    answers = await asyncio.gather(*map(ask, range(2, 102)))
    assert answers == [f" number {number}" for number in range(2, 102)]
