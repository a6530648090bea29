import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from persimmon.model.grammar import GrammarSpec
from persimmon.model.tool_calls import Function, calls_schema, describe
from tests.server.http.conftest import LiveServer
from tests.server.http.fake_engine import FakeEngine, Sample, says

pytestmark = pytest.mark.anyio

EOS = 1
CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
PARAMETERS = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
FIND, NOW = Function("find", "Finds a word.", PARAMETERS), Function("now")
TOOLS = [
    {"type": "function", "function": {"name": "find", "description": "Finds a word.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
UNSUPPORTED = "is not supported; list the allowed values instead"
NOT = {"not": {"required": ["a"]}}
NAMED = {"type": "function", "function": {"name": "find"}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    """The choice among some of the functions, as OpenAI writes it."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


CALL = '[{"name": "find", "arguments": {"word": "a"}}]'
TWO_CALLS = '[{"name": "find", "arguments": {"word": "a"}}, {"name": "now", "arguments": {}}]'
Tokens = Callable[[str], list[int]]


async def answer(http: httpx.AsyncClient, **body: object) -> dict[str, Any]:
    response = await http.post(CHAT, json=ASK | {"tools": TOOLS} | body)
    assert response.status_code == 200, response.text
    return response.json()


async def streamed(http: httpx.AsyncClient, **body: object) -> tuple[list[dict[str, Any]], str]:
    """The deltas of a stream, and why it ended."""
    response = await http.post(CHAT, json=ASK | {"tools": TOOLS, "stream": True} | body)
    assert response.status_code == 200, response.text
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert choices[-1]["delta"] == {}
    return [choice["delta"] for choice in choices[:-1]], choices[-1]["finish_reason"]


def without_ids(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ids = [call.pop("id") for call in calls if "id" in call]
    assert all(each.startswith("call_") for each in ids)
    assert len(set(ids)) == len(ids)
    return calls


def one_call(arguments: str) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "find", "arguments": arguments}}]


def schema_of(grammar: GrammarSpec | None) -> Any:
    assert grammar is not None
    assert (grammar.kind, grammar.leading_space) == ("json_schema", True)
    return json.loads(grammar.text)


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


async def test_tokens_of_calls_are_reported_too(http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens) -> None:
    engine.script = says(tokens(CALL), EOS)
    [choice] = (await answer(http, return_token_ids=True))["choices"]
    assert choice["token_ids"] == tokens(CALL)
    response = await http.post(CHAT, json=ASK | {"tools": TOOLS, "stream": True, "return_token_ids": True})
    events = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if "{" in line]
    assert [token for event in events for token in event["choices"][0].get("token_ids", [])] == tokens(CALL)


def assistant(*calls: tuple[str, str, str], content: object = None) -> dict[str, Any]:
    made = [
        {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for id, name, arguments in calls
    ]
    return {"role": "assistant", "content": content, "tool_calls": made, "refusal": None}


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


def function(**fields: object) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "find"} | fields}]}


def schema_format(schema: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


BAD_CHOICES: list[object] = ["any", 5, {}, {"type": "function"}, NAMED | {"x": 1}]
BAD_CHOICES += [{"type": "allowed_tools"}, allowed("auto"), allowed("any", "find"), allowed("auto", "find") | {"x": 1}]
CHOICES = (
    'Invalid \'tool_choice\': it must be "none", "auto", "required", the choice of a function like '
    '{"type": "function", "function": {"name": "..."}}, or of several like {"type": "allowed_tools", "allowed_tools": '
    '{"mode": "auto", "tools": [{"type": "function", "function": {"name": "..."}}]}}.'
)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"tools": [None]}, "tools[0]", None),
        ({"tools": [{}]}, "tools[0].type", None),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", None),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", None),
        (function(name="a b"), "tools[0].function.name", None),
        (function(name="a" * 65), "tools[0].function.name", None),
        (function(parameters="object"), "tools[0].function.parameters", None),
        (
            function(parameters={"type": "array"}),
            "tools[0].function.parameters",
            "Invalid 'tools[0].function.parameters': its type must be \"object\", since arguments have names.",
        ),
        ({"tools": TOOLS * 2}, "tools", "Invalid 'tools': two functions have the name 'find'."),
        ({"tools": [TOOLS[1]] * 129}, "tools", None),
        *(({"tools": TOOLS, "tool_choice": choice}, "tool_choice", CHOICES) for choice in BAD_CHOICES),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}},
            "tool_choice",
            "Invalid 'tool_choice': no function in tools has the name 'other'.",
        ),
        (
            {"tools": TOOLS, "tool_choice": allowed("auto", "now", "other")},
            "tool_choice",
            "Invalid 'tool_choice': no function in tools has the name 'other'.",
        ),
        ({"tool_choice": NAMED}, "tool_choice", "Invalid 'tool_choice': no function in tools has the name 'find'."),
        (
            {"tool_choice": "required"},
            "tool_choice",
            "Invalid 'tool_choice': it is 'required', but there are no tools to call.",
        ),
        ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls", None),
        (
            {"tools": TOOLS, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "Invalid 'structured_outputs': with tools it is only allowed when tool_choice is 'none'.",
        ),
        (
            {"tools": [*TOOLS, *function(name="c", strict=True, parameters=NOT)["tools"]]},
            "tools[2].function.parameters",
            f"Invalid 'tools[2].function.parameters': the JSON schema at /not {UNSUPPORTED}.",
        ),
        (
            function(parameters=NOT) | {"tool_choice": NAMED},
            "tools[0].function.parameters",
            f"Invalid 'tools[0].function.parameters': the JSON schema at /not {UNSUPPORTED}.",
        ),
        (
            {"tools": [*TOOLS, *function(name="c", parameters=NOT)["tools"]], "tool_choice": "required"},
            "tools[2].function.parameters",
            f"Invalid 'tools[2].function.parameters': the JSON schema at /not {UNSUPPORTED}.",
        ),
        (
            {"tools": TOOLS, "response_format": schema_format(NOT)},
            "response_format.json_schema.schema",
            None,
        ),
        (
            {"functions": [{"name": "find"}]},
            "functions",
            "'functions' is not supported by this server: OpenAI replaced it; use tools.",
        ),
        (
            {"function_call": {"name": "find"}},
            "function_call",
            "'function_call' is not supported by this server: OpenAI replaced it; use tool_choice.",
        ),
        (
            {"messages": [*ASK["messages"], {"role": "tool", "content": "a"}]},
            "messages[1].tool_call_id",
            "Missing required parameter: 'messages[1].tool_call_id'.",
        ),
        (
            {"messages": [*ASK["messages"], {"role": "tool", "content": "a", "tool_call_id": "x"}]},
            "messages[1].tool_call_id",
            "Invalid 'messages[1].tool_call_id': no earlier message makes a call with this id.",
        ),
        ({"messages": [{"role": "user", "content": "a", "tool_call_id": "x"}]}, "messages[0].tool_call_id", None),
        ({"messages": [assistant(("x", "find", "{}")) | {"role": "user"}]}, "messages[0].tool_calls", None),
        ({"messages": [{"role": "tool", "tool_call_id": "x"}]}, "messages[0].content", None),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id", None),
        ({"messages": [*ASK["messages"], assistant(("x", "find", "{}"))]}, "messages", None),
    ],
)  # fmt: skip
async def test_what_cannot_be_asked_of_tools_is_a_400_that_names_the_field(
    http: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any], param: str, message: str | None
) -> None:
    response = await http.post(CHAT, json=ASK | body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    if message is not None:
        assert error["message"] == message
    assert engine.submitted == []


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


async def test_min_tokens_and_ignore_eos_hold_where_a_text_may_come_instead_of_calls(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says(tokens(CALL), EOS)
    [choice] = (await answer(http, min_tokens=99, ignore_eos=True, stop_token_ids=[5]))["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert engine.submitted[-1].sampling.min_tokens == 99
    assert engine.submitted[-1].stop_token_ids == [5]
