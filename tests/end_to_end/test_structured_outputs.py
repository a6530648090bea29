"""Answers of a real model in the form that was asked for: schemas, choices, grammars and calls of tools."""

import asyncio
import json
import random
import re
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from tests.end_to_end.serving import Server

CHAT = [{"role": "user", "content": "What does galaxy mean?"}]


class Sense(BaseModel, extra="forbid"):
    meaning: str = Field(max_length=20)
    part: Literal["noun", "verb"]


class Word(BaseModel, extra="forbid"):
    """A word of a dictionary."""

    word: str = Field(max_length=12)
    letters: int = Field(ge=1, le=9)
    senses: list[Sense] = Field(max_length=2)


@pytest.fixture
def client(demo: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def leaf(rng: random.Random) -> dict[str, Any]:
    low = rng.randrange(-50, 50)
    return rng.choice(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"enum": ["red", 'a "quoted" one', 7, None]},
            {"const": "köln\n"},
            {"type": "integer", "minimum": low, "maximum": low + rng.randrange(99)},
            {"type": "string", "maxLength": rng.randrange(8)},
            {"type": "string", "pattern": "^[a-z]{2,5}-[0-9]{2}$"},
            {"type": "string", "format": "date"},
        ]
    )


def schema(rng: random.Random, levels: int) -> dict[str, Any]:
    """A JSON Schema whose values are not long."""
    if levels == 0:
        return leaf(rng)
    inner = [schema(rng, levels - 1) for _ in range(rng.randrange(1, 4))]
    names = rng.sample(["a", "name", "é", "x y", "type"], len(inner))
    return rng.choice(
        [
            {"anyOf": inner},
            {"type": "array", "items": inner[0], "minItems": 1, "maxItems": 3},
            {
                "type": "object",
                "properties": dict(zip(names, inner, strict=True)),
                "required": names[: rng.randrange(len(names) + 1)],
                "additionalProperties": False,
            },
        ]
    )


def test_every_answer_that_ends_is_valid_under_its_schema(demo: Server) -> None:
    rng = random.Random(4)
    schemas = [schema(rng, rng.randrange(3)) for _ in range(50)]

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schemas[number]}}
        body: dict[str, Any] = {"response_format": form, "temperature": 1.2, "seed": number, "max_tokens": 400}
        if number % 2:
            response = await client.post("/v1/chat/completions", json=body | {"messages": CHAT})
        else:
            response = await client.post("/v1/completions", json=body | {"prompt": "human: Hi\n\nadept:"})
        assert response.status_code == 200, response.text
        [choice] = response.json()["choices"]
        assert choice["finish_reason"] == "stop"
        answer = json.loads(choice["message"]["content"] if number % 2 else choice["text"])
        jsonschema.validate(answer, schemas[number], jsonschema.Draft202012Validator)

    async def main() -> None:
        async with httpx.AsyncClient(base_url=demo.url, timeout=120) as client:
            await asyncio.gather(*(ask(client, number) for number in range(len(schemas))))

    asyncio.run(main())
    demo.wait_until_idle()


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the client's own messages do not fit its own types
def test_openais_client_parses_an_answer_into_a_model(demo: Server, client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": demo.name, "messages": CHAT, "response_format": Word, "temperature": 1, "seed": 1}
    choice = client.chat.completions.parse(**ask).choices[0]
    assert isinstance(choice.message.parsed, Word)
    with client.chat.completions.stream(**ask) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == choice.message.parsed
    again = client.chat.completions.parse(**ask | {"messages": [*CHAT, choice.message, *CHAT]})
    assert isinstance(again.choices[0].message.parsed, Word)


def test_a_json_object_is_one(demo: Server, client: openai.OpenAI) -> None:
    # The demo has never seen JSON and would write for long; what closes it is made more probable.
    ids = httpx.post(f"{demo.url}/tokenize", json={"prompt": '""}', "add_special_tokens": False}).json()["tokens"]
    ask: dict[str, Any] = {"model": demo.name, "messages": CHAT, "temperature": 0, "max_tokens": 200}
    biases = {str(token): 12 for token in ids}
    ask |= {"response_format": {"type": "json_object"}, "logit_bias": biases}
    choice = client.chat.completions.create(**ask).choices[0]
    assert choice.finish_reason == "stop"
    assert isinstance(json.loads(choice.message.content or ""), dict)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"choice": ["a noun", "a verb"]}, "a noun|a verb"),
        ({"regex": "[a-z]{3,9} is (a|an) [a-z]{2,5}\\."}, "[a-z]{3,9} is (a|an) [a-z]{2,5}\\."),
        ({"grammar": 'root ::= "(" root ")" | "x"'}, r"\(*x\)*"),
        ({"grammar": 'start: WORD ("\\n\\nhuman:" WORD)~2\nWORD: /[a-z]{2}/'}, "[a-z]{2}(\n\nhuman:[a-z]{2}){2}"),
    ],
)
def test_vllms_forms_are_followed(demo: Server, client: openai.OpenAI, form: dict[str, Any], pattern: str) -> None:
    ask: dict[str, Any] = {"model": demo.name, "messages": CHAT, "temperature": 1.2, "n": 4, "max_tokens": 60}
    choices = client.chat.completions.create(**ask, extra_body={"structured_outputs": form}).choices
    assert len(choices) == 4
    for choice in choices:
        assert choice.finish_reason == "stop"
        assert re.fullmatch(pattern, choice.message.content or "")


TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "look_up", "parameters": Word.model_json_schema()}},
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]
NAMED: Any = {"type": "function", "function": {"name": "look_up"}}


def check_call(call: Any) -> None:
    if call.function.name == "look_up":
        Word.model_validate_json(call.function.arguments)
    else:
        assert (call.function.name, json.loads(call.function.arguments)) == ("now", {})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("choice", "reason"), [("required", "tool_calls"), (NAMED, "stop")])
def test_forced_calls_fit_their_functions(
    demo: Server, client: openai.OpenAI, stream: bool, choice: Any, reason: str
) -> None:
    ask: dict[str, Any] = {"model": demo.name, "messages": CHAT, "tools": TOOLS, "tool_choice": choice}
    ask |= {"parallel_tool_calls": False, "temperature": 1, "seed": 3, "n": 3, "logprobs": True}
    if stream:
        with client.chat.completions.stream(**ask) as events:
            answer: Any = events.get_final_completion()
    else:
        answer = client.chat.completions.create(**ask)
    assert len(answer.choices) == 3
    for each in answer.choices:
        assert (each.finish_reason, each.message.content) == (reason, None)
        [call] = each.message.tool_calls
        check_call(call)
        written = bytes(byte for token in each.logprobs.content for byte in token.bytes or ()).decode()
        assert call.function.arguments in written


def test_several_calls_may_be_made_at_once(demo: Server, client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": demo.name, "messages": CHAT, "tools": TOOLS[1:], "tool_choice": "required"}
    [choice] = client.chat.completions.create(**ask, temperature=0, max_tokens=200).choices
    calls = choice.message.tool_calls or []
    # The demo finds no end of them, and the limit may cut the last one short.
    assert len(calls) > 2
    assert len({call.id for call in calls}) == len(calls)
    for call in calls[:-1]:
        check_call(call)


def test_a_conversation_goes_on_after_a_tools_result(demo: Server, client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": demo.name, "messages": CHAT, "tools": TOOLS, "temperature": 0}
    message = client.chat.completions.create(**ask, tool_choice=NAMED).choices[0].message
    [call] = message.tool_calls or []
    results = [message, {"role": "tool", "tool_call_id": call.id, "content": "a noun"}]
    answer = client.chat.completions.create(**ask | {"messages": [*CHAT, *results]}, max_tokens=60).choices[0]
    assert answer.message.content
    assert answer.message.tool_calls is None
    again = client.chat.completions.create(**ask | {"messages": [*CHAT, *results, *CHAT]}, tool_choice=NAMED)
    [call] = again.choices[0].message.tool_calls or []
    check_call(call)


def test_tools_do_not_change_a_plain_answer_into_anything_else(demo: Server, client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": demo.name, "messages": CHAT, "tools": TOOLS, "temperature": 0, "max_tokens": 60}
    plain = client.chat.completions.create(**ask).choices[0]
    assert plain.finish_reason == "stop"
    assert plain.message.content
    assert plain.message.tool_calls is None
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == plain.message.content


def test_openais_client_sends_pydantics_models_as_strict_tools(demo: Server, client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": demo.name, "messages": CHAT, "temperature": 0, "max_tokens": 60}
    ask |= {"tools": [openai.pydantic_function_tool(Word)], "parallel_tool_calls": False}
    plain = client.chat.completions.parse(**ask).choices[0]
    assert plain.finish_reason == "stop"
    assert plain.message.content
    forced = client.chat.completions.parse(**ask | {"max_tokens": 300, "tool_choice": "required"}).choices[0]
    assert forced.finish_reason == "tool_calls"
    [call] = forced.message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Word)


def test_a_schema_that_cannot_be_followed_is_a_400(demo: Server, client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"uniqueItems": True}}}
    ask: dict[str, Any] = {"model": demo.name, "messages": CHAT, "response_format": form}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**ask)
    assert refused.value.param == "response_format.json_schema.schema"
