"""Calls in answers: how they are found, streamed, cut off and sent back."""

import json
from typing import Any

import httpx
import openai
import pytest

from persimmon.model.tool_calls import describe
from tests.server.http.conftest import LiveServer
from tests.server.http.fake_engine import FakeEngine, Sample, says
from tests.server.http.generation.tool_calls import (
    ASK,
    CALL,
    CHAT,
    EOS,
    FIND,
    NAMED,
    NOW,
    TOOLS,
    TWO_CALLS,
    Tokens,
    answer,
    assistant,
    one_call,
    streamed,
    without_ids,
)

pytestmark = pytest.mark.anyio


async def test_the_model_is_told_of_tools_before_the_conversation(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says(tokens("Hello!"), EOS)
    messages = [{"role": "system", "content": "Be brief."}, *ASK["messages"]]
    await answer(http, messages=messages)
    reported = f"Be brief.\n\n{describe([FIND, NOW])}\n\nhuman: Hi\n\nadept:"
    assert engine.submitted[-1].token_ids == [1, *tokens(reported)]
    assert engine.submitted[-1].sampling.grammar is None
    counted = (await http.post("/tokenize", json={"messages": messages, "tools": TOOLS})).json()
    assert counted["tokens"] == engine.submitted[-1].token_ids
    await answer(http, messages=messages, tool_choice="none")
    assert engine.submitted[-1].token_ids == [1, *tokens("Be brief.\n\nhuman: Hi\n\nadept:")]


@pytest.mark.parametrize(
    "text", ["Hello!", "[1] is a note.", '[{"name": "other", "arguments": {}}]', f"Like {CALL}", CALL[:20]]
)
@pytest.mark.parametrize("choice", [None, "auto"])
async def test_an_answer_that_is_no_call_is_plain(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens, text: str, choice: str | None
) -> None:
    engine.script = says(tokens(text), EOS)
    [whole] = (await answer(http, tool_choice=choice))["choices"]
    assert whole["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert whole["finish_reason"] == "stop"
    [first, *deltas], reason = await streamed(http, tool_choice=choice)
    assert first == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas) == text
    assert all(delta.keys() == {"content"} for delta in deltas)
    assert reason == "stop"


async def test_a_call_that_the_model_makes_by_itself_is_one(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says(tokens(TWO_CALLS), EOS)
    [choice] = (await answer(http))["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"].pop("content") is None
    assert without_ids(choice["message"].pop("tool_calls")) == [
        *one_call('{"word": "a"}'),
        {"type": "function", "function": {"name": "now", "arguments": "{}"}},
    ]
    assert choice["message"] == {"role": "assistant", "refusal": None}


async def test_calls_are_streamed_as_openai_does(http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens) -> None:
    engine.script = says(tokens(TWO_CALLS), EOS)
    [first, *deltas], reason = await streamed(http)
    assert first == {"role": "assistant", "content": ""}
    assert reason == "tool_calls"
    assert all(delta.keys() == {"tool_calls"} for delta in deltas)
    calls = without_ids([call for delta in deltas for call in delta["tool_calls"]])
    second = next(place for place, call in enumerate(calls) if call["index"] == 1)
    for begin, name, rest, arguments in (
        (calls[0], "find", calls[1:second], '{"word": "a"}'),
        (calls[second], "now", calls[second + 1 :], "{}"),
    ):
        index = begin["index"]
        assert begin == {"index": index, "type": "function", "function": {"name": name, "arguments": ""}}
        assert all(call == {"index": index, "function": {"arguments": call["function"]["arguments"]}} for call in rest)
        assert "".join(call["function"]["arguments"] for call in rest) == arguments
    assert second > 3  # in pieces


async def test_a_list_of_calls_ends_the_answer(http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens) -> None:
    engine.script = says(tokens(f"{CALL}\n\nThat was my call."))
    body = await answer(http, max_tokens=200)
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    assert without_ids(body["choices"][0]["message"]["tool_calls"]) == one_call('{"word": "a"}')
    assert body["usage"]["completion_tokens"] <= len(tokens(CALL))
    assert (await streamed(http, max_tokens=200))[1] == "tool_calls"


@pytest.mark.parametrize(
    ("choice", "text", "content", "arguments"),
    [
        ("required", CALL[:12], None, None),
        ("required", CALL[:40], None, '{"word": '),
        (NAMED, '{"wo', None, '{"wo'),
        ("auto", CALL[:40], None, '{"word": '),
        ("auto", CALL[:12], CALL[:12], None),
    ],
)
async def test_a_call_that_is_cut_off_by_the_limit_says_so(
    http: httpx.AsyncClient,
    engine: FakeEngine,
    tokens: Tokens,
    choice: object,
    text: str,
    content: str | None,
    arguments: str | None,
) -> None:
    engine.script = says(tokens(text))
    [whole] = (await answer(http, tool_choice=choice, max_tokens=len(tokens(text))))["choices"]
    assert (whole["finish_reason"], whole["message"]["content"]) == ("length", content)
    calls = whole["message"].get("tool_calls")
    assert (calls and without_ids(calls)) == (arguments and one_call(arguments))
    deltas, reason = await streamed(http, tool_choice=choice, max_tokens=len(tokens(text)))
    assert reason == "length"
    assert ("".join(delta.get("content") or "" for delta in deltas) or None) == content


async def test_without_parallel_calls_the_answer_ends_after_the_first(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says(tokens(TWO_CALLS), EOS)
    [choice] = (await answer(http, parallel_tool_calls=False))["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert without_ids(choice["message"]["tool_calls"]) == one_call('{"word": "a"}')


async def test_each_of_several_answers_has_its_own_calls(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    def script(sample: Sample) -> Any:
        return says(tokens(CALL if sample.index else "Hello!"), EOS)(sample)

    engine.script = script
    first, second = (await answer(http, n=2))["choices"]
    assert (first["finish_reason"], first["message"]["content"]) == ("stop", "Hello!")
    assert (second["finish_reason"], second["message"]["content"]) == ("tool_calls", None)
    assert without_ids(second["message"]["tool_calls"]) == one_call('{"word": "a"}')


async def test_tokens_of_calls_are_reported_too(http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens) -> None:
    engine.script = says(tokens(CALL), EOS)
    [choice] = (await answer(http, return_token_ids=True))["choices"]
    assert choice["token_ids"] == tokens(CALL)
    response = await http.post(CHAT, json=ASK | {"tools": TOOLS, "stream": True, "return_token_ids": True})
    events = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if "{" in line]
    assert [token for event in events for token in event["choices"][0].get("token_ids", [])] == tokens(CALL)


async def test_earlier_calls_and_their_results_are_turns(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says(tokens("Hello!"), EOS)
    messages = [
        *ASK["messages"],
        assistant(("x", "find", '{"word":  "a"}'), ("y", "now", "")),
        {"role": "tool", "tool_call_id": "y", "content": "12:00"},
        {"role": "tool", "tool_call_id": "x", "content": [{"type": "text", "text": "not found"}]},
        assistant(("x", "now", "{}"), content="Once more."),
        {"role": "tool", "tool_call_id": "x", "content": "12:01"},
        {"role": "user", "content": "Well?"},
    ]
    await answer(http, messages=messages, tools=[])
    assert engine.submitted[-1].token_ids == [
        1,
        *tokens(
            "human: Hi\n\n"
            'adept: [{"name": "find", "arguments": {"word":  "a"}}, {"name": "now", "arguments": {}}]\n\n'
            "human: Result of now: 12:00\n\nResult of find: not found\n\n"
            'adept: Once more.\n\n[{"name": "now", "arguments": {}}]\n\n'
            "human: Result of now: 12:01\n\nWell?\n\n"
            "adept:"
        ),
    ]


async def test_what_the_model_called_reads_the_same_in_the_next_turn(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says(tokens(CALL), EOS)
    [choice] = (await answer(http))["choices"]
    result = {"role": "tool", "tool_call_id": choice["message"]["tool_calls"][0]["id"], "content": "none"}
    await answer(http, messages=[*ASK["messages"], choice["message"], result])
    first, second = engine.submitted
    text = f"{describe([FIND, NOW])}\n\nhuman: Hi\n\nadept: {CALL}\n\nhuman: Result of find: none\n\nadept:"
    assert second.token_ids == [1, *tokens(text)]
    assert second.token_ids[: len(first.token_ids)] == first.token_ids


async def test_what_openais_client_has_parsed_may_be_sent_back(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says(tokens("Hello!"), EOS)
    called = assistant(("x", "find", '{"word": "a"}'))
    called["tool_calls"][0]["index"] = 0
    called["tool_calls"][0]["function"]["parsed_arguments"] = {"word": "a"}
    result = {"role": "tool", "tool_call_id": "x", "content": "found"}
    parsed: dict[str, Any] = {"role": "assistant", "content": "{}", "parsed": {}, "tool_calls": None}
    await answer(http, messages=[*ASK["messages"], called, result, parsed, *ASK["messages"]], tools=None)


async def test_openais_client_runs_a_tool_and_goes_on(server: LiveServer, engine: FakeEngine, tokens: Tokens) -> None:
    engine.script = says(tokens(CALL), EOS)
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        ask: dict[str, Any] = ASK | {"model": "demo", "tools": TOOLS}
        async with client.chat.completions.stream(**ask) as stream:
            final = (await stream.get_final_completion()).choices[0]
        plain = (await client.chat.completions.create(**ask)).choices[0]
        for choice in (final, plain):
            assert choice.finish_reason == "tool_calls"
            [call] = choice.message.tool_calls or []
            assert (call.type, call.function.name, call.function.arguments) == ("function", "find", '{"word": "a"}')
            result = {"role": "tool", "tool_call_id": call.id, "content": "found"}
            messages = [*ASK["messages"], choice.message, result]
            await client.chat.completions.create(**ask | {"messages": messages, "tool_choice": "none"})
            text = f"human: Hi\n\nadept: {CALL}\n\nhuman: Result of find: found\n\nadept:"
            assert engine.submitted[-1].token_ids == [1, *tokens(text)]


async def test_min_tokens_and_ignore_eos_hold_where_a_text_may_come_instead_of_calls(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says(tokens(CALL), EOS)
    [choice] = (await answer(http, min_tokens=99, ignore_eos=True, stop_token_ids=[5]))["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert engine.submitted[-1].sampling.min_tokens == 99
    assert engine.submitted[-1].stop_token_ids == [5]
