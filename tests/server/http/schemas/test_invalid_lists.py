"""A list of a million wrong items is one error, not a million of them."""

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from persimmon.server.http.schemas.chat import ChatCompletionRequest
from persimmon.server.http.schemas.chat_message import MAX_MESSAGES
from persimmon.server.http.schemas.completions import CompletionRequest
from persimmon.server.http.schemas.embeddings import EmbeddingRequest
from persimmon.server.http.schemas.tokens import DetokenizeRequest, TokenizeRequest

COUNT = 20_000
NUMBERS: list[object] = [1] * COUNT
USER = {"role": "user", "content": "Hi"}
FUNCTION = {"type": "function", "function": {"name": "a"}}


def tool(**fields: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": "a", **fields}}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatCompletionRequest, {"messages": NUMBERS}),
        (ChatCompletionRequest, {"messages": [{}] * COUNT}),
        (ChatCompletionRequest, {"messages": [USER] * (MAX_MESSAGES + 1)}),
        (ChatCompletionRequest, {"messages": [USER | {f"a{number}": 1 for number in range(COUNT)}]}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": NUMBERS}]}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": [{"type": "text"}] * COUNT}]}),
        (ChatCompletionRequest, {"messages": [{"role": "assistant", "tool_calls": NUMBERS}]}),
        (ChatCompletionRequest, {"messages": [{"role": "assistant", "tool_calls": [{}] * COUNT}]}),
        (ChatCompletionRequest, {"messages": [USER], "tools": NUMBERS}),
        (ChatCompletionRequest, {"messages": [USER], "tools": [FUNCTION] * COUNT}),
        (CompletionRequest, {"prompt": [5, *["a"] * COUNT]}),
        (CompletionRequest, {"prompt": [[5]] * COUNT + [5]}),
        (CompletionRequest, {"prompt": "a", "stop": NUMBERS}),
        (CompletionRequest, {"prompt": "a", "stop_token_ids": ["a"] * COUNT}),
        (CompletionRequest, {"prompt": "a", "stop_token_ids": NUMBERS}),
        (CompletionRequest, {"prompt": "a", "logit_bias": {str(number): "a" for number in range(COUNT)}}),
        (CompletionRequest, {"prompt": "a", "structured_outputs": {"choice": NUMBERS}}),
        (CompletionRequest, {"prompt": "a"} | {f"a{number}": 1 for number in range(COUNT)}),
        (EmbeddingRequest, {"input": ["a", *NUMBERS]}),
        (TokenizeRequest, {"messages": NUMBERS}),
        (TokenizeRequest, {"messages": [USER], "tools": NUMBERS}),
        (DetokenizeRequest, {"tokens": ["a"] * COUNT}),
    ],
)
def test_a_list_of_wrong_items_is_one_error(kind: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as raised:
        kind.model_validate_json(json.dumps(body))
    assert raised.value.error_count() <= 2
