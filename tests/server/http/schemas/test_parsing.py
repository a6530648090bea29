"""Which bodies are read at all."""

import json

import pytest

from persimmon.server.http.errors import ApiError
from persimmon.server.http.schemas import parsing
from persimmon.server.http.schemas.chat import ChatCompletionRequest
from persimmon.server.http.schemas.completions import CompletionRequest
from persimmon.server.http.schemas.parsing import parse


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "MAX_OBJECTS", 20)
    monkeypatch.setattr(parsing, "MAX_VALUES", 100)


@pytest.mark.parametrize(
    "text",
    ["{[,]}" * 100, '{"a": [1, 2]}' * 100, "\\{" * 100 + "\\", '"' * 99, "\n,{" * 200, '\\"{' * 100],
)
def test_what_stands_in_a_text_does_not_count(text: str) -> None:
    assert parse(json.dumps({"prompt": text}).encode(), CompletionRequest).prompt == [text]


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b'{"prompt": [' + b"5, " * 200 + b"5]}", "values"),
        (b'{"prompt": [' + b'"",' * 200 + b'""]}', "values"),
        (b'{"messages": [' + b"{}," * 30 + b"{}]}", "objects and lists"),
        (b'{"prompt": "[[[", "a": ' + b"[" * 30, "objects and lists"),
    ],
)
def test_a_body_of_too_many_values_is_not_read(body: bytes, what: str) -> None:
    with pytest.raises(ApiError, match=f"JSON {what}; send less at a time") as raised:
        parse(body, ChatCompletionRequest)
    assert raised.value.status == 400


@pytest.mark.parametrize("begin", [b'"', b'{"prompt": "', b'"\\'])
def test_a_text_without_an_end_is_invalid_json(begin: bytes) -> None:
    for body in (begin + b"{" * 50, begin + b'\\"{' * 50, begin + b"{" * 50 + b"\\"):
        with pytest.raises(ApiError) as raised:
            parse(body, CompletionRequest)
        error = raised.value.body.error
        assert error.code == "invalid_json" or "JSON" in error.message


@pytest.mark.parametrize(("given", "read"), [("8.0", 8), ("8e0", 8), ("0.0", 0)])
def test_a_whole_number_may_be_written_with_a_point(given: str, read: int) -> None:
    request = parse(f'{{"prompt": "a", "max_tokens": {given}, "top_k": {given}}}'.encode(), CompletionRequest)
    assert (request.max_tokens, request.top_k) == (read, read)
    assert type(request.max_tokens) is int


@pytest.mark.parametrize("given", ["8.5", '"8"', "true", "1e400", "[8.0]"])
def test_what_is_no_whole_number_is_refused(given: str) -> None:
    with pytest.raises(ApiError) as raised:
        parse(f'{{"prompt": "a", "max_tokens": {given}}}'.encode(), CompletionRequest)
    assert raised.value.body.error.param == "max_tokens"
