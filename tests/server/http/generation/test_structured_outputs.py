import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from persimmon.model.config import PersimmonConfig
from persimmon.model.grammar import GrammarKind, GrammarSpec
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.client import EngineClient
from persimmon.server.http.app import create_app
from tests.server.http.fake_engine import FakeEngine, says

pytestmark = pytest.mark.anyio

EOS = 1
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO: dict[str, Any] = {"prompt": "Hello"}
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
SCHEMA = {"type": "object", "properties": {"ä": {"type": "integer"}, "a": {}}, "required": ["ä"]}
TEXT = '{"type":"object","properties":{"ä":{"type":"integer"},"a":{}},"required":["ä"]}'
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
LAX_SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": False}}
Tokens = Callable[[str], list[int]]


async def grammar(http: httpx.AsyncClient, engine: FakeEngine, path: str, **body: object) -> GrammarSpec | None:
    """The form of the answer that the engine receives."""
    engine.script = says([9], EOS)
    response = await http.post(path, json=(HELLO if path == COMPLETIONS else ASK) | body)
    assert response.status_code == 200, response.text
    return engine.submitted[-1].sampling.grammar


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        ({"response_format": JSON_SCHEMA}, "json_schema", TEXT),
        ({"response_format": LAX_SCHEMA}, "json_schema", TEXT),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", TEXT),
        ({"structured_outputs": {"json": TEXT, "regex": None}}, "json_schema", TEXT),
        ({"structured_outputs": {"regex": "[ab]+"}}, "regex", "[ab]+"),
        ({"structured_outputs": {"choice": ["yes", 'n"ö']}}, "choice", '["yes", "n\\"ö"]'),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "grammar", 'root ::= "a"'),
        ({"structured_outputs": {"json_object": True, "disable_any_whitespace": False}}, "json_object", ""),
        ({"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}}, "regex", "a"),
    ],
)  # fmt: skip
async def test_what_an_answer_must_look_like_reaches_the_engine(
    http: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any], kind: GrammarKind, text: str
) -> None:
    # In a chat the space after the label comes before what the client asks for.
    assert await grammar(http, engine, path, **body) == GrammarSpec(kind, text, leading_space=path == CHAT)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("body", [{}, {"response_format": {"type": "text"}}, {"response_format": None}])
async def test_without_it_answers_are_free(
    http: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    assert await grammar(http, engine, path, **body) is None


async def test_what_would_be_a_new_turn_is_part_of_an_answer_that_follows_a_grammar(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says(tokens("a\n\nhuman: b"), EOS)
    body = ASK | {"structured_outputs": {"regex": "(?s:.*)"}}
    choice = (await http.post(CHAT, json=body)).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("a\n\nhuman: b", "stop")
    choice = (await http.post(CHAT, json=body | {"stop": "human"})).json()["choices"][0]
    assert choice["message"]["content"] == "a\n\n"


async def test_an_answer_that_is_cut_off_by_the_limit_says_so(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says(tokens('{"a": 1}'), EOS)
    body = ASK | {"response_format": {"type": "json_object"}, "max_tokens": 3}
    choice = (await http.post(CHAT, json=body)).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert '{"a": 1}'.startswith(choice["message"]["content"])


def format_of(schema: object, **fields: object) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, **fields}}}


SCHEMA_FIELD = "response_format.json_schema.schema"
ONE = "give exactly one of json, regex, choice, grammar and json_object, not"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"response_format": {}}, "response_format.type", "Missing required parameter: 'response_format.type'."),
        ({"response_format": "json"}, "response_format", None),
        (
            {"response_format": {"type": "yaml"}},
            "response_format.type",
            "Invalid 'response_format.type': input should be 'text', 'json_object' or 'json_schema', not 'yaml'.",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "Missing required parameter: 'response_format.json_schema'.",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            SCHEMA_FIELD,
            f"Missing required parameter: '{SCHEMA_FIELD}'.",
        ),
        (
            {"response_format": {**JSON_SCHEMA, "type": "json_object"}},
            "response_format.json_schema",
            "Invalid 'response_format.json_schema': it is only allowed with the type 'json_schema', "
            "not with 'json_object'.",
        ),
        (format_of({}, name="a b"), "response_format.json_schema.name", None),
        (format_of(True), SCHEMA_FIELD, None),
        (format_of({}, strict="yes"), "response_format.json_schema.strict", None),
        (
            format_of({"properties": {"a": {"type": "nonsense"}}}),
            SCHEMA_FIELD,
            f"Invalid '{SCHEMA_FIELD}': the JSON schema at /properties/a/type is \"nonsense\"; expected one or "
            "several of null, boolean, number, integer, string, array, object.",
        ),
        (format_of({"enum": []}), SCHEMA_FIELD, None),
        (format_of({"enum": ["a" * 70_000]}), SCHEMA_FIELD, None),
        ({"structured_outputs": {}}, "structured_outputs", f"Invalid 'structured_outputs': {ONE} none."),
        (
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "structured_outputs",
            f"Invalid 'structured_outputs': {ONE} regex and choice.",
        ),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object", None),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json", None),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", None),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", None),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", None),
        ({"structured_outputs": {"grammar": "root ::= missing"}}, "structured_outputs.grammar", None),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " *"}},
            "structured_outputs.whitespace_pattern",
            "'structured_outputs.whitespace_pattern' is not supported by this server: whitespace between JSON's tokens "
            "is fixed; leave it out.",
        ),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": JSON_SCHEMA},
            "structured_outputs",
            "Invalid 'structured_outputs': response_format already sets the form of the answer.",
        ),
        (
            {"guided_json": SCHEMA},
            "guided_json",
            "'guided_json' is not supported by this server: vLLM replaced it in version 0.12; "
            "use structured_outputs.json.",
        ),
        (
            {"guided_decoding_backend": "xgrammar"},
            "guided_decoding_backend",
            "'guided_decoding_backend' is not supported by this server: there is one backend; leave it out.",
        ),
    ],
)  # fmt: skip
async def test_what_cannot_be_asked_of_an_answer_is_a_400_that_names_the_field(
    http: httpx.AsyncClient,
    engine: FakeEngine,
    path: str,
    body: dict[str, Any],
    param: str,
    message: str | None,
) -> None:
    response = await http.post(path, json=(HELLO if path == COMPLETIONS else ASK) | body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    if message is not None:
        assert error["message"] == message
    assert engine.submitted == []


ENDINGS: dict[str, Any] = {"stop": ["Hel"], "stop_token_ids": [5], "ignore_eos": True, "min_tokens": 4}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("body", "text", "stop_token_ids"),
    [
        ({"response_format": JSON_SCHEMA}, "Hello!", [EOS]),
        ({"response_format": {"type": "json_object"}}, "Hello!", [EOS]),
        ({"structured_outputs": {"json": SCHEMA}}, "Hello!", [EOS]),
        ({"structured_outputs": {"choice": ["Hello!"]}}, "Hello!", [EOS]),
        # vLLM's users end these with stop strings.
        ({"structured_outputs": {"regex": "Hello!"}}, "", [5, EOS]),
        ({"structured_outputs": {"grammar": 'root ::= "Hello!"'}}, "", [5, EOS]),
    ],
)
async def test_what_would_end_an_answer_does_not_cut_enforced_json_and_choices(
    http: httpx.AsyncClient,
    engine: FakeEngine,
    tokens: Tokens,
    path: str,
    body: dict[str, Any],
    text: str,
    stop_token_ids: list[int],
) -> None:
    engine.script = says(tokens("Hello!"), EOS)
    response = await http.post(path, json=(HELLO if path == COMPLETIONS else ASK) | body | ENDINGS)
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    assert (choice["text"] if path == COMPLETIONS else choice["message"]["content"]).strip() == text
    assert choice["finish_reason"] == "stop"
    assert engine.submitted[-1].stop_token_ids == stop_token_ids
    assert engine.submitted[-1].sampling.min_tokens == 0


async def test_the_properties_of_a_schema_keep_their_order(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    schema = {"type": "object", "properties": {name: {"type": "null"} for name in "zebra"}}
    sent = await grammar(http, engine, CHAT, **format_of(schema))
    assert sent is not None
    assert list(json.loads(sent.text)["properties"]) == list("zebra")


@pytest.mark.parametrize(("default", "asked", "opened"), [
    (False, None, False), (False, True, False), (False, False, True), (True, None, True), (True, True, False),
])  # fmt: skip
async def test_the_request_and_else_the_server_say_whether_objects_are_open(
    engine_client: EngineClient,
    tokenizer: Tokenizer,
    config: PersimmonConfig,
    engine: FakeEngine,
    default: bool,
    asked: bool | None,
    opened: bool,
) -> None:
    app = create_app(engine_client, tokenizer, config, "demo", additional_properties=default)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        outputs = {"json": SCHEMA} | ({} if asked is None else {"disable_additional_properties": asked})
        sent = await grammar(client, engine, CHAT, structured_outputs=outputs)
        assert sent is not None
        assert sent.additional_properties == opened
        sent = await grammar(client, engine, CHAT, response_format=JSON_SCHEMA)
        assert sent is not None
        assert sent.additional_properties == default
