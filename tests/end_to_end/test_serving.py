"""The running server through the real `openai` client, for one client and for many."""

import asyncio
import random

import httpx
import openai
import pytest

CHAT = [{"role": "user", "content": "What does galaxy mean?"}]


@pytest.fixture
def client(demo):
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def asynchronous(demo) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{demo.url}/v1",
        api_key="none",
        max_retries=0,
        timeout=300,
    )


def test_a_chat_and_its_stream_say_the_same(demo, client):
    plain = client.chat.completions.create(model=demo.name, messages=CHAT, temperature=0)
    stream = client.chat.completions.create(
        model=demo.name, messages=CHAT, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert plain.choices[0].message.content.startswith('"Galaxy" is a noun.')
    assert plain.choices[0].finish_reason == "stop"
    assert "human:" not in text
    assert text == plain.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_a_conversation_remembers_its_first_turn(demo, client):
    first = client.chat.completions.create(model=demo.name, messages=CHAT, temperature=0)
    turns = [*CHAT, {"role": "assistant", "content": first.choices[0].message.content}]
    turns.append({"role": "user", "content": "What part of speech is it?"})
    second = client.chat.completions.create(model=demo.name, messages=turns, temperature=0)
    assert second.choices[0].message.content == '"Galaxy" is a noun.'


def test_a_completion_and_its_stream_say_the_same(demo, client):
    asked = {"model": demo.name, "prompt": "human: Hello!\n\nadept:", "max_tokens": 24, "temperature": 0}
    plain = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True))
    assert plain.choices[0].text.startswith(" Hello! I am a small dictionary.")
    assert "".join(chunk.choices[0].text for chunk in chunks) == plain.choices[0].text
    assert chunks[-1].choices[0].finish_reason == plain.choices[0].finish_reason == "length"


def test_seeded_samples_repeat_and_differ_among_themselves(demo, client):
    asked = {"model": demo.name, "messages": CHAT, "temperature": 1.5, "seed": 11, "n": 4, "max_tokens": 24}
    first = [choice.message.content for choice in client.chat.completions.create(**asked).choices]
    again = [choice.message.content for choice in client.chat.completions.create(**asked).choices]
    assert first == again
    assert len(set(first)) == 4


def test_the_models_are_listed(demo, client):
    assert [each.id for each in client.models.list()] == [demo.name]


def test_an_unknown_model_and_a_long_prompt_are_openai_errors(demo, client):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model=demo.name, prompt="a word " * 3000, max_tokens=5)
    assert raised.value.code == "context_length_exceeded"


def test_two_hundred_concurrent_requests_all_get_their_own_right_answer(demo):
    words = ["galaxy", "robot", "guitar", "penguin", "volcano", "rainbow", "bicycle", "kernel", "token", "queue"]
    prompts = [f"human: What does {word} mean?\n\nadept:" for word in words]

    async def answer(client: openai.AsyncOpenAI, prompt: str, max_tokens: int) -> str:
        completion = await client.completions.create(
            model=demo.name, prompt=prompt, max_tokens=max_tokens, temperature=0
        )
        return completion.choices[0].text

    async def main() -> None:
        async with asynchronous(demo) as client:
            alone = {(prompt, length): await answer(client, prompt, length) for prompt in prompts for length in (6, 13)}
            asked = list(alone) * 10
            random.Random(0).shuffle(asked)
            answers = await asyncio.gather(*(answer(client, *each) for each in asked))
        assert len(answers) == 200
        assert answers == [alone[each] for each in asked]

    asyncio.run(main())


def test_streams_and_plain_answers_mix_without_harm(demo):
    async def streamed(client: openai.AsyncOpenAI, word: str) -> str:
        stream = await client.chat.completions.create(
            model=demo.name, messages=[{"role": "user", "content": f"Define {word}."}], temperature=0, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def plain(client: openai.AsyncOpenAI, word: str) -> str:
        completion = await client.chat.completions.create(
            model=demo.name, messages=[{"role": "user", "content": f"Define {word}."}], temperature=0
        )
        return completion.choices[0].message.content or ""

    async def main() -> None:
        words = ["galaxy", "robot", "guitar", "penguin", "volcano", "rainbow", "bicycle", "kernel"]
        async with asynchronous(demo) as client:
            streams, plains = await asyncio.gather(
                asyncio.gather(*(streamed(client, word) for word in words)),
                asyncio.gather(*(plain(client, word) for word in words)),
            )
        assert streams == plains

    asyncio.run(main())


def test_three_hundred_clients_that_vanish_leave_nothing_behind(demo):
    """Some while queued, some in their prompt, some while decoding, some at the very end; streaming or not."""
    chance = random.Random(1)

    async def vanish(client: httpx.AsyncClient, number: int) -> None:
        body = {
            "prompt": f"human: Tell me about number {number}. {'word ' * chance.randrange(200)}\n\nadept:",
            "max_tokens": chance.choice([1, 20, 400]),
            "ignore_eos": True,
            "stream": chance.random() < 0.5,
            "n": chance.choice([1, 1, 2]),
        }
        # Each tenth client leaves after the first bytes, whenever they come; the others when their time is over.
        patience = None if number % 10 == 0 else chance.random() * 3
        leaves_early = 1.0 if patience is None else 0.02
        try:
            async with asyncio.timeout(patience):
                async with client.stream("POST", f"{demo.url}/v1/completions", json=body) as response:
                    async for _ in response.aiter_bytes():
                        if chance.random() < leaves_early:
                            return
        except TimeoutError:
            return

    async def main() -> None:
        limits = httpx.Limits(max_connections=300, max_keepalive_connections=0)
        async with httpx.AsyncClient(limits=limits, timeout=120) as client:
            await asyncio.gather(*(vanish(client, number) for number in range(300)))

    before = demo.metrics()
    asyncio.run(main())
    after = demo.wait_until_idle()
    assert after["persimmon_prompt_tokens_total"] > before["persimmon_prompt_tokens_total"]
    pids = demo.children()
    answer = httpx.post(f"{demo.url}/v1/chat/completions", json={"messages": CHAT, "temperature": 0}, timeout=60).json()
    assert answer["choices"][0]["message"]["content"].startswith('"Galaxy" is a noun.')
    assert demo.children() == pids
