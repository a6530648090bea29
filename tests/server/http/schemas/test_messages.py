"""What messages of a conversation may hold: what other servers take, and whatever this server has answered."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from persimmon.server.engine.messages import SequenceOutput
from tests.server.http.fake_engine import FakeEngine, says

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
EOS = 1
USER: dict[str, Any] = {"role": "user", "content": "Hi"}
CALL = {"id": "x", "type": "function", "function": {"name": "find", "arguments": "{}"}}
TOOLS = [{"type": "function", "function": {"name": "find"}}]
Tokens = Callable[[str], list[int]]


async def ask(http: httpx.AsyncClient, *messages: dict[str, Any], **body: object) -> dict[str, Any]:
    response = await http.post(CHAT, json={"messages": messages, "max_tokens": 50, **body})
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([USER | {"name": "Ann"}], "human: Hi\n\nadept:"),
        ([{"role": "system", "content": "Be brief.", "name": "x"}, USER], "Be brief.\n\nhuman: Hi\n\nadept:"),
        (
            [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "x", "content": "a", "name": "find"},
            ],
            'human: Hi\n\nadept: [{"name": "find", "arguments": {}}]\n\nhuman: Result of find: a\n\nadept:',
        ),
        (
            [USER, {"role": "assistant", "content": None, "refusal": "I can't."}, USER],
            "human: Hi\n\nadept: I can't.\n\nhuman: Hi\n\nadept:",
        ),
        (
            [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, USER],
            "human: Hi\n\nadept: No.\n\nhuman: Hi\n\nadept:",
        ),
        ([USER, {"role": "assistant", "content": None}, USER], "human: Hi\n\nadept: \n\nhuman: Hi\n\nadept:"),
        (
            [
                USER,
                {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm.", "reasoning": "Hm."},
                USER | {"cache_control": {"type": "ephemeral"}},
            ],
            "human: Hi\n\nadept: Yes.\n\nhuman: Hi\n\nadept:",
        ),
        (
            [
                USER,
                # As LiteLLM and OpenRouter answer.
                {
                    "role": "assistant",
                    "content": "Yes.",
                    "images": [],
                    "provider_specific_fields": {},
                    "reasoning_details": [{"type": "reasoning.text", "text": "Hm."}],
                    "thinking_blocks": [],
                },
                USER,
            ],
            "human: Hi\n\nadept: Yes.\n\nhuman: Hi\n\nadept:",
        ),
        ([{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}], "human: Hi\n\nadept:"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "Hi", "image_url": None, "annotations": []}]}],
            "human: Hi\n\nadept:",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]}],
            "human: Hi\n\nadept:",
        ),
    ],
)
async def test_a_message_may_hold_what_says_nothing_to_the_model(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens, messages: list[dict[str, Any]], text: str
) -> None:
    engine.script = says([9])
    await ask(http, *messages)
    assert engine.submitted[0].token_ids == [1, *tokens(text)]


@pytest.mark.parametrize(
    ("said", "body"),
    [
        ("Hello!", {}),
        ('[{"name": "find", "arguments": {}}]', {"tools": TOOLS}),
        ("", {"tools": TOOLS, "tool_choice": "required"}),
    ],
)
async def test_an_answer_may_be_sent_back_as_it_came(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens, said: str, body: dict[str, Any]
) -> None:
    engine.script = says(tokens(said), EOS)
    message = (await ask(http, USER, **body))["message"]
    assert message.keys() >= {"role", "content", "refusal"}
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "a"} for call in message.get("tool_calls", [])]
    await ask(http, USER, message, *results, USER)


async def test_hints_in_tools_are_ignored(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = says([9])
    hint = {"cache_control": {"type": "ephemeral"}}
    tool = {"type": "function", "function": {"name": "find", **hint}, "defer_loading": False, **hint}
    await ask(http, USER, tools=[tool])


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", {"prompt": "Hi"}), (CHAT, {"messages": [USER]})])
async def test_a_top_p_of_zero_takes_the_most_probable_token(
    http: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    engine.script = says([9])
    assert (await http.post(path, json=body | {"top_p": 0, "temperature": 1.5})).status_code == 200
    assert engine.submitted[0].sampling.temperature == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 0, "logprobs": 1}),
        (CHAT, {"messages": [USER], "max_tokens": 0, "logprobs": True}),
        (CHAT, {"messages": [USER], "max_completion_tokens": 0}),
    ],
)
async def test_no_new_tokens_are_an_empty_answer_with_its_usage(
    http: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any], stream: bool
) -> None:
    engine.script = lambda sample: [SequenceOutput(sample.sequence_id, [], "length")]
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    response = await http.post(path, json=body | options)
    assert response.status_code == 200, response.text
    assert engine.submitted[0].max_tokens == 0
    assert '"finish_reason":"length"' in response.text
    assert '"completion_tokens":0' in response.text
    assert '"content":null' not in response.text


async def test_several_empty_answers_take_one_computation_a_prompt(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = lambda sample: [SequenceOutput(sample.sequence_id, [], "length")]
    prompts = [tokens("one"), tokens("two")]
    body = {"prompt": prompts, "max_tokens": 0, "n": 3, "echo": True}
    answer = (await http.post("/v1/completions", json=body)).json()
    texts = [(choice["index"], choice["text"]) for choice in answer["choices"]]
    assert texts == [(0, "one"), (1, "one"), (2, "one"), (3, "two"), (4, "two"), (5, "two")]
    assert answer["usage"]["completion_tokens"] == 0
    assert [sample.token_ids for sample in engine.submitted] == prompts
