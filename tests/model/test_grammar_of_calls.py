"""Free texts or calls whose arguments match: what is enforced, and what is refused."""

import json
from typing import Any

import pytest

from persimmon.model.grammar import GrammarCompiler, GrammarError, GrammarSpec

FIND = {
    "type": "object",
    "properties": {"word": {"type": "string"}},
    "required": ["word"],
    "additionalProperties": False,
}


def spec(functions: dict[str, Any], parallel: bool = True) -> GrammarSpec:
    return GrammarSpec("text_or_calls", json.dumps({"functions": functions, "max_calls": 3 if parallel else 1}))


COMPILER = GrammarCompiler.for_checking()
MATCHER = COMPILER.compile(spec({"find": FIND, "find_all": {"type": "object"}}))


def allowed(text: str, begun: Any = MATCHER) -> bool | None:
    """Whether an answer may be this text; None if none may even begin with it."""
    matcher = begun.copy()
    for byte in text.encode():
        try:
            matcher.consume(byte)
        except GrammarError:
            return None
    return bool(matcher.is_complete)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello!\n\nhuman: é",
        "[1]",
        '[{"name": "find", "arguments": 5}]',
        '[{"name": "other", "arguments": {}}]',
        '[{"name": "find", "arguments": ',
        'Like [{"name": "find", "arguments": {}}]',
        '[{"name": "find", "arguments": {"word": "a"}}]',
        '[{"name":"find","arguments":{"word":"a"}},{"name": "find_all", "arguments": {"x": [1]}}]',
    ],
)
def test_an_answer_may_be_any_text_or_calls(text: str) -> None:
    assert allowed(text)


@pytest.mark.parametrize("white_space", ["", " ", "\n\t"])
def test_what_begins_a_call_is_nothing_else(white_space: str) -> None:
    signs = ["[", "{", '"name"', ":", '"find"', ",", '"arguments"', ":"]
    begun = white_space + white_space.join(signs) + white_space
    assert allowed(begun)
    assert not allowed(begun + "{")
    assert allowed(begun + '{"wrod": 1}}]') is None


def test_arguments_fit_and_a_list_ends_the_answer() -> None:
    call = '[{"name": "find", "arguments": {"word": "a"}}'
    assert allowed(call) is False
    assert allowed('[{"name": "find", "arguments": {}}]') is None
    assert allowed(f'{call}, {{"name": "other"') is None
    assert allowed(f"{call}]\n") is None


def test_without_parallel_calls_there_is_one() -> None:
    single = COMPILER.compile(spec({"find": FIND}, parallel=False))
    assert allowed('[{"name": "find", "arguments": {"word": "a"}}]', single)
    assert allowed('[{"name": "find", "arguments": {"word": "a"}}, ', single) is None


def test_calls_are_no_more_than_were_allowed() -> None:
    call = '{"name": "find", "arguments": {"word": "a"}}'
    assert allowed(f"[{call}, {call}, {call}]")
    assert allowed(f"[{call}, {call}, {call}, ") is None


def test_as_many_functions_as_a_request_may_have_compile() -> None:
    matcher = COMPILER.compile(spec({f"a_function_with_a_long_name_{number}": FIND for number in range(128)}))
    assert allowed('[{"name": "a_function_with_a_long_name_77", "arguments": {"word": "a"}}]', matcher)
    assert allowed('[{"name": "a_function_with_a_long_name_777", "arguments": {"word": "a"}}]', matcher)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"functions": {}, "max_calls": 3}',
        '{"functions": {"a b": {}}, "max_calls": 3}',
        '{"functions": {"a": {}}, "max_calls": 0}',
        '{"functions": {"a": {}}}',
    ],
)
def test_what_describes_no_functions_is_refused(text: str) -> None:
    with pytest.raises(GrammarError, match="the description of functions"):
        COMPILER.check(GrammarSpec("text_or_calls", text))


def test_a_schema_that_cannot_be_enforced_is_refused() -> None:
    with pytest.raises(GrammarError, match="/not is not supported"):
        COMPILER.check(spec({"find": {"not": {"required": ["a"]}}}))
