"""Requests with tools that are refused."""

from typing import Any

import httpx
import pytest

from tests.server.http.fake_engine import FakeEngine
from tests.server.http.generation.tool_calls import ASK, CHAT, NAMED, TOOLS, allowed, assistant, function, schema_format

pytestmark = pytest.mark.anyio

UNSUPPORTED = "is not supported; list the allowed values instead"
NOT = {"not": {"required": ["a"]}}
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
