"""Which calls the engine enforces: by tool_choice, strict functions and a response format."""

import json
from typing import Any

import httpx
import pytest

from persimmon.model.tool_calls import calls_schema, describe
from tests.server.http.fake_engine import FakeEngine, says
from tests.server.http.generation.tool_calls import (
    CALL,
    EOS,
    FIND,
    NAMED,
    NOW,
    PARAMETERS,
    TOOLS,
    Tokens,
    allowed,
    answer,
    function,
    one_call,
    schema_format,
    schema_of,
    streamed,
    without_ids,
)

pytestmark = pytest.mark.anyio


async def test_only_allowed_tools_are_called(http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens) -> None:
    other = '[{"name": "now", "arguments": {}}]'
    engine.script = says(tokens(other), EOS)
    [whole] = (await answer(http, tool_choice=allowed("auto", "find")))["choices"]
    assert whole["message"]["content"] == other
    assert "tool_calls" not in whole["message"]
    assert engine.submitted[-1].sampling.grammar is None
    engine.script = says(tokens(CALL), EOS)
    for mode in ("auto", "required"):
        [whole] = (await answer(http, tool_choice=allowed(mode, "find")))["choices"]
        assert without_ids(whole["message"]["tool_calls"]) == one_call('{"word": "a"}')
    assert schema_of(engine.submitted[-1].sampling.grammar) == calls_schema([FIND], parallel=True)


async def test_nulls_in_a_choice_say_nothing(http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens) -> None:
    engine.script = says(tokens('{"word": "a"}'), EOS)
    choice = {"type": "function", "function": {"name": "find", "strict": None}, "cache_control": None}
    [whole] = (await answer(http, tool_choice=choice))["choices"]
    assert without_ids(whole["message"]["tool_calls"]) == one_call('{"word": "a"}')


async def test_the_engine_forces_calls_where_they_are_required(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says(tokens(CALL), EOS)
    [choice] = (await answer(http, tool_choice="required"))["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert without_ids(choice["message"]["tool_calls"]) == one_call('{"word": "a"}')
    assert schema_of(engine.submitted[-1].sampling.grammar) == calls_schema([FIND, NOW], parallel=True)
    [first, *_], reason = await streamed(http, tool_choice="required", parallel_tool_calls=False)
    assert (first, reason) == ({"role": "assistant", "content": None}, "tool_calls")
    assert schema_of(engine.submitted[-1].sampling.grammar) == calls_schema([FIND, NOW], parallel=False)


async def test_a_named_function_is_called_with_arguments_that_fit_it(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says(tokens('{"word": "a"}'), EOS)
    [choice] = (await answer(http, tool_choice=NAMED))["choices"]
    assert choice["finish_reason"] == "stop"  # as OpenAI says it where the function is named
    assert choice["message"]["content"] is None
    assert without_ids(choice["message"]["tool_calls"]) == one_call('{"word": "a"}')
    sent = engine.submitted[-1]
    assert schema_of(sent.sampling.grammar) == PARAMETERS
    text = f'{describe([FIND, NOW])}\n\nhuman: Hi\n\nadept: [{{"name": "find", "arguments":'
    assert sent.token_ids == [1, *tokens(text)]
    [first, begin, *deltas], reason = await streamed(http, tool_choice=NAMED)
    assert (first, reason) == ({"role": "assistant", "content": None}, "stop")
    assert without_ids(begin["tool_calls"]) == [
        {"index": 0, "type": "function", "function": {"name": "find", "arguments": ""}}
    ]
    pieces = [call["function"]["arguments"] for delta in deltas for call in delta["tool_calls"]]
    assert "".join(pieces) == '{"word": "a"}'
    assert len(pieces) > 2


async def test_arguments_are_an_object_even_where_parameters_do_not_say_so(
    http: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = says([9])
    for parameters, schema in [
        (None, {"type": "object", "properties": {}, "additionalProperties": False}),
        ({}, {"type": "object"}),
        ({"type": ["null", "object"], "title": "T"}, {"type": "object", "title": "T"}),
    ]:
        tools = [{"type": "function", "function": {"name": "find", "parameters": parameters}}]
        await answer(http, tools=tools, tool_choice=NAMED, max_tokens=1)
        assert schema_of(engine.submitted[-1].sampling.grammar) == schema


async def test_with_a_response_format_an_answer_is_calls_or_of_that_format(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"type": "null"}}}
    form = schema_format(schema)
    engine.script = says(tokens('{"a": null}'), EOS)
    [choice] = (await answer(http, response_format=form))["choices"]
    assert choice["message"] == {"role": "assistant", "content": '{"a": null}', "refusal": None}
    assert schema_of(engine.submitted[-1].sampling.grammar) == calls_schema([FIND, NOW], True, schema)
    engine.script = says(tokens(CALL), EOS)
    [choice] = (await answer(http, response_format={"type": "json_object"}))["choices"]
    assert without_ids(choice["message"]["tool_calls"]) == one_call('{"word": "a"}')
    assert schema_of(engine.submitted[-1].sampling.grammar) == calls_schema([FIND, NOW], True, {"type": "object"})
    # A call that is forced has no content, which is what the format is about.
    await answer(http, response_format=form, tool_choice="required")
    assert schema_of(engine.submitted[-1].sampling.grammar) == calls_schema([FIND, NOW], True)
    await answer(http, response_format=form, tool_choice="none")
    assert schema_of(engine.submitted[-1].sampling.grammar) == schema


async def test_the_models_own_calls_are_held_to_the_parameters_of_strict_functions(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says(tokens("Hello!\n\nhuman: Bye"))
    strict = function(strict=True, parameters=PARAMETERS)["tools"]
    [choice] = (await answer(http, tools=[*strict, TOOLS[1]], parallel_tool_calls=False))["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello!", "refusal": None}
    grammar = engine.submitted[-1].sampling.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.leading_space) == ("text_or_calls", True)
    assert json.loads(grammar.text) == {"functions": {"find": PARAMETERS, "now": {"type": "object"}}, "max_calls": 1}
    await answer(http, tools=strict, tool_choice="none")
    assert engine.submitted[-1].sampling.grammar is None


async def test_tools_whose_schemas_cannot_be_forced_may_be_called_by_the_model_itself(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says(tokens(CALL), EOS)
    [choice] = (await answer(http, **function(parameters={"not": {"required": ["x"]}})))["choices"]
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    "body",
    [{"tool_choice": "required"}, {"tools": [*function(strict=True, name="now")["tools"], TOOLS[0]]}],
    ids=["required", "strict"],
)
async def test_what_would_end_an_answer_does_not_cut_enforced_calls(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens, body: dict[str, Any]
) -> None:
    engine.script = says(tokens(CALL), EOS)
    body |= {"stop": ["find", '"'], "stop_token_ids": tokens(":"), "ignore_eos": True, "min_tokens": 90}
    [choice] = (await answer(http, **body))["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert without_ids(choice["message"]["tool_calls"]) == one_call('{"word": "a"}')
    assert engine.submitted[-1].stop_token_ids == [EOS]
    assert engine.submitted[-1].sampling.min_tokens == 0
    deltas, reason = await streamed(http, **body)
    assert "".join(call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls", ())) == (
        '{"word": "a"}'
    )
    assert reason == "tool_calls"


@pytest.mark.parametrize(
    ("text", "content"),
    [("Hello! Bye.", "Hello"), ("[1] Bye", "[1] Bye"), ("[{! Bye", "[{"), ('[{"na', '[{"na'), ("Hello", "Hello")],
)
async def test_stop_strings_end_a_text_that_may_come_instead_of_strict_calls(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens, text: str, content: str
) -> None:
    engine.script = says(tokens(text), EOS)
    body: dict[str, Any] = {"tools": function(strict=True)["tools"], "stop": ["! "], "logprobs": True}
    [choice] = (await answer(http, **body))["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (content, "stop")
    deltas, reason = await streamed(http, **body)
    assert ("".join(delta.get("content") or "" for delta in deltas), reason) == (content, "stop")
