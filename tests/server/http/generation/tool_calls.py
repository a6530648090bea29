"""Requests with tools, and how answers with calls are read."""

import json
from collections.abc import Callable
from typing import Any

import httpx

from persimmon.model.grammar import GrammarSpec
from persimmon.model.tool_calls import Function

EOS = 1
CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
PARAMETERS = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
FIND, NOW = Function("find", "Finds a word.", PARAMETERS), Function("now")
TOOLS = [
    {"type": "function", "function": {"name": "find", "description": "Finds a word.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
NAMED = {"type": "function", "function": {"name": "find"}}
CALL = '[{"name": "find", "arguments": {"word": "a"}}]'
TWO_CALLS = '[{"name": "find", "arguments": {"word": "a"}}, {"name": "now", "arguments": {}}]'
Tokens = Callable[[str], list[int]]


def allowed(mode: str, *names: str) -> dict[str, Any]:
    """The choice among some of the functions, as OpenAI writes it."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


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


def assistant(*calls: tuple[str, str, str], content: object = None) -> dict[str, Any]:
    made = [
        {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for id, name, arguments in calls
    ]
    return {"role": "assistant", "content": content, "tool_calls": made, "refusal": None}


def function(**fields: object) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "find"} | fields}]}


def schema_format(schema: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
