"""Calls read from answers, described to the model and put into schemas: one form everywhere."""

import itertools
import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persimmon.model.grammar import GrammarCompiler, GrammarSpec
from persimmon.model.tool_calls import (
    MAX_CALLS,
    CallForm,
    CallReader,
    Function,
    ToolCall,
    begun_call,
    calls_schema,
    calls_text,
    describe,
    result_text,
)

FORM = CallForm(("find", "find_all"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(
    st.builds(
        ToolCall, st.sampled_from(FORM.names), st.dictionaries(st.text(max_size=3), JSON, max_size=3).map(json.dumps)
    ),
    min_size=1,
    max_size=3,
)


def pieces(text: str, cuts: set[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[begin:end] for begin, end in itertools.pairwise(places)]


def read(parts: list[str], form: CallForm = FORM) -> tuple[str, list[ToolCall], CallReader]:
    """The content, the calls, and the reader at the end."""
    reader, content, calls = CallReader(form), "", dict[int, ToolCall]()
    for part in parts:
        text, deltas = reader.push(part)
        content += text
        for delta in deltas:
            if delta.name is not None:
                assert delta.index == len(calls)
                calls[delta.index] = ToolCall(delta.name, delta.arguments)
            else:
                before = calls[delta.index]
                calls[delta.index] = ToolCall(before.name, before.arguments + delta.arguments)
    return content + reader.finish(), list(calls.values()), reader


@given(CALLS, st.sets(st.integers(0, 400), max_size=8), st.sampled_from(["", " ", "\n  "]))
def test_calls_are_read_as_they_are_written_however_the_answer_comes(
    calls: list[ToolCall], cuts: set[int], space: str
) -> None:
    written = calls_text(calls).replace('[{"', f'[{space}{{{space}"', 1)
    content, found, reader = read(pieces(written + "\n\nAnything else", cuts))
    assert (content, found) == ("", calls)
    assert reader.ended
    assert reader.has_whole_calls


@given(st.text(), st.sets(st.integers(0, 50), max_size=8))
def test_any_other_text_is_content(text: str, cuts: set[int]) -> None:
    content, calls, reader = read(pieces(text, cuts))
    assert (content, calls, reader.ended) == (text, [], False)


@pytest.mark.parametrize(
    "text",
    [
        "[1] is a footnote.",
        '[{"name": "finder", "arguments": {}}]',
        '[{"name": "fi nd", "arguments": {}}]',
        '[{"name": "find", "args": {}}]',
        '[{"name": "find", "arguments": "{}"}]',
        '[{"arguments": {}, "name": "find"}]',
        '{"name": "find", "arguments": {}}',
        'Like this: [{"name": "find", "arguments": {}}]',
        '[{"name": "find", "argum',
    ],
)
@pytest.mark.parametrize("size", [1, 4, 100])
def test_what_only_looks_like_a_call_is_content(text: str, size: int) -> None:
    content, calls, _ = read([text[place : place + size] for place in range(0, len(text), size)])
    assert (content, calls) == (text, [])


def test_text_is_held_back_only_while_it_may_become_a_call() -> None:
    reader = CallReader(FORM)
    assert reader.push("Hello [") == ("Hello [", [])
    reader = CallReader(FORM)
    assert reader.push('[{"name": "find') == ("", [])
    assert reader.push("er") == ('[{"name": "finder', [])
    assert reader.push("[") == ("[", [])


def test_arguments_come_as_soon_as_they_are_there() -> None:
    reader = CallReader(FORM)
    _, [begun, first] = reader.push('[{"name": "find", "arguments": {"a')
    assert (begun.index, begun.name, begun.arguments, first.name, first.arguments) == (0, "find", "", None, '{"a')
    _, [second] = reader.push('": 1')
    assert second.arguments == '": 1'
    assert not reader.has_whole_calls


def test_what_follows_on_a_call_without_being_one_ends_the_answer() -> None:
    content, calls, reader = read(['[{"name": "find", "arguments": {}}, {"name": "unknown", "arguments": {}}]'])
    assert (content, calls, reader.ended) == ("", [ToolCall("find", "{}")], True)


def test_without_parallel_calls_there_is_one() -> None:
    text = calls_text([ToolCall("find", "{}"), ToolCall("find_all", "{}")])
    _, calls, reader = read([text], CallForm(FORM.names, parallel=False))
    assert (calls, reader.ended) == ([ToolCall("find", "{}")], True)


def test_of_a_forced_call_nothing_is_ever_content() -> None:
    content, calls, _ = read(['[{"name": "fin'], CallForm(FORM.names, forced=True))
    assert (content, calls) == ("", [])


@given(st.dictionaries(st.text(max_size=3), JSON).map(json.dumps), st.sets(st.integers(0, 50), max_size=5))
def test_an_answer_whose_call_the_prompt_has_begun_is_the_arguments(arguments: str, cuts: set[int]) -> None:
    form = CallForm(("find",), forced=True, begun="find")
    content, calls, reader = read(pieces(arguments, cuts), form)
    assert (content, calls) == ("", [ToolCall("find", arguments)])
    assert reader.ended
    assert f"{begun_call('find')} {arguments}}}]" == " " + calls_text(calls)


def test_a_call_without_arguments_has_an_empty_object() -> None:
    assert calls_text([ToolCall("now", "")]) == '[{"name": "now", "arguments": {}}]'


def test_the_model_reads_what_functions_there_are_and_how_to_call_them() -> None:
    parameters = {"type": "object", "properties": {"word": {"type": "string"}}}
    assert describe([Function("find", "Finds a wörd.", parameters), Function("now")]) == (
        "You can call these functions, each described in JSON:\n\n"
        '{"name": "find", "description": "Finds a wörd.", '
        '"parameters": {"type": "object", "properties": {"word": {"type": "string"}}}}\n'
        '{"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": false}}\n\n'
        "To call functions, answer with a list of calls and nothing else, like this:\n\n"
        '[{"name": "function", "arguments": {"parameter": "value"}}]'
    )
    assert result_text("find", "two lines\nof it") == "Result of find: two lines\nof it"


RECURSIVE = {
    "$id": "https://example.com/tree",
    "properties": {
        "tree": {"$ref": "#/definitions/node"},
        "self": {"$ref": "#"},
        "$ref": {"const": {"$ref": "#/definitions/node"}},
    },
    "definitions": {"node": {"type": "object", "properties": {"next": {"$ref": "#/definitions/node"}}}},
    "additionalProperties": False,
}
FUNCTIONS = [
    Function("find", None, {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}),
    Function("walk", None, RECURSIVE),
]


@pytest.mark.parametrize(
    ("calls", "valid"),
    [
        ([("find", {"word": "a"})], True),
        ([("find", {"word": "a"}), ("walk", {"tree": {"next": {"next": {}}}, "self": {"tree": {}}})], True),
        ([("walk", {"$ref": {"$ref": "#/definitions/node"}})], True),
        ([("walk", {"tree": {"next": 5}})], False),
        ([("walk", {"self": {"tree": 5}})], False),
        ([("walk", {"$ref": 5})], False),
        ([("find", {})], False),
        ([("other", {})], False),
        ([], False),
    ],
)
def test_the_schema_of_calls_holds_each_to_its_own_parameters(
    calls: list[tuple[str, dict[str, Any]]], valid: bool
) -> None:
    answer = [{"name": name, "arguments": arguments} for name, arguments in calls]
    schema = calls_schema(FUNCTIONS, parallel=True)
    assert jsonschema.Draft202012Validator(schema).is_valid(answer) == valid
    compiler = GrammarCompiler.for_checking()
    matcher = compiler.compile(GrammarSpec("json_schema", json.dumps(schema)))
    assert all(_follows(matcher, byte) for byte in json.dumps(answer).encode()) == valid


def _follows(matcher: Any, byte: int) -> bool:
    try:
        matcher.consume(byte)
    except ValueError:
        return False
    return True


def test_the_schema_of_one_call_has_no_second_and_that_of_calls_or_content_has_either() -> None:
    call = {"name": "find", "arguments": {"word": "a"}}
    single = jsonschema.Draft202012Validator(calls_schema(FUNCTIONS, parallel=False))
    assert single.is_valid([call])
    assert not single.is_valid([call, call])
    content = {"type": "array", "items": {"$ref": "#/$defs/number"}, "$defs": {"number": {"type": "integer"}}}
    many = jsonschema.Draft202012Validator(calls_schema(FUNCTIONS, parallel=True))
    assert many.is_valid([call] * MAX_CALLS)
    assert not many.is_valid([call] * (MAX_CALLS + 1))
    either = jsonschema.Draft202012Validator(calls_schema(FUNCTIONS, parallel=True, otherwise=content))
    assert either.is_valid([call, call])
    assert either.is_valid([1, 2])
    assert not either.is_valid(["a"])


def test_references_of_a_function_lead_to_its_own_schemas() -> None:
    def function(name: str, kind: str, **more: Any) -> Function:
        inner = {"$id": "inner", "type": "object", "properties": {"x": {"$ref": "#/$defs/it"}}, "required": ["x"]}
        definitions = {"inner": {**inner, "$defs": {"it": {"type": kind}}}, "it": {"$anchor": "it", "type": kind}}
        properties = {"a": {"$ref": "#/$defs/it"}, "b": {"$ref": "inner"}, "c": {"$ref": "#it"}}
        parameters = {"properties": properties, "required": ["a", "b", "c"], "$defs": definitions, **more}
        return Function(name, parameters=parameters)

    same: dict[str, Any] = {"$id": "https://example.com/parameters"}
    functions = [function("f", "null"), function("g", "boolean"), function("h", "null", **same)]
    functions.append(function("i", "boolean", **same))
    schema = calls_schema(functions, parallel=False)
    matcher = GrammarCompiler.for_checking().compile(GrammarSpec("json_schema", json.dumps(schema)))
    for name, own, others in (("f", None, True), ("g", True, None), ("h", None, True), ("i", True, None)):
        for value, valid in ((own, True), (others, False)):
            answer = [{"name": name, "arguments": {"a": value, "b": {"x": value}, "c": value}}]
            assert jsonschema.Draft202012Validator(schema).is_valid(answer) == valid
            at = matcher.copy()
            assert all(_follows(at, byte) for byte in json.dumps(answer).encode()) == valid
