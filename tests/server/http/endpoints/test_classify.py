"""/classify and /classify/tokens on a fake engine: what is asked of it, and what is said of its scores."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from persimmon.model.config import Architecture, PersimmonConfig
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.client import EngineClient
from tests.server.http.fake_engine import FakeEngine
from tests.server.http.pooling import LABELS, gives, model_of, pools, serving, states

pytestmark = pytest.mark.anyio

CLASSIFY, TOKENS = "/classify", "/classify/tokens"
GENERATE = ("POST /v1/completions", "POST /v1/chat/completions", "PUT /api")
TEXTS, OF_TOKENS = Architecture.SEQUENCE_CLASSIFICATION, Architecture.TOKEN_CLASSIFICATION
PAD = 3


class Server:
    """Apps of this test's engine."""

    def __init__(self, engine_client: EngineClient, tokenizer: Tokenizer, config: PersimmonConfig) -> None:
        self._engine_client, self._tokenizer, self._config = engine_client, tokenizer, config

    @asynccontextmanager
    async def of(self, architecture: Architecture, **changes: Any) -> AsyncIterator[httpx.AsyncClient]:
        config = model_of(self._config, architecture, pad_token_id=PAD, **changes)
        async with serving(self._engine_client, self._tokenizer, config) as http:
            yield http


@pytest.fixture
def server(engine_client: EngineClient, tokenizer: Tokenizer, config: PersimmonConfig) -> Server:
    return Server(engine_client, tokenizer, config)


async def post(http: httpx.AsyncClient, path: str, given: object, **fields: Any) -> dict[str, Any]:
    response = await http.post(path, json={"input": given} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def softmax(scores: Sequence[float] | np.ndarray) -> list[float]:
    shares = np.exp(np.array(scores, dtype=np.float64))
    return (shares / shares.sum()).tolist()


async def test_a_text_gets_its_most_probable_label_and_all_probabilities(
    server: Server, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.script = gives([[1.0, 3.0, -0.5]])
    ids = tokenizer.encode("What a day!")
    async with server.of(TEXTS) as http:
        answer = await post(http, CLASSIFY, "What a day!", model="demo", user="someone")
    assert answer.pop("id").startswith("classify-")
    assert answer.pop("created") > 0
    (own,) = answer["data"]
    assert own.pop("probs") == pytest.approx(softmax([1.0, 3.0, -0.5]))
    assert answer == {
        "object": "list",
        "model": "demo",
        "data": [{"index": 0, "label": "glad", "num_classes": 3}],
        "usage": {
            "prompt_tokens": len(ids),
            "total_tokens": len(ids),
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        },
    }
    [asked] = engine.submitted
    assert (asked.token_ids, asked.max_tokens, asked.whole.pooling, asked.whole.scores) == (ids, 0, "last", True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, softmax([1.0, 3.0, -800.0])),
        ({"problem_type": "multi_label_classification"}, [0.7310586, 0.9525741, 0.0]),
        ({"problem_type": "regression"}, [1.0, 3.0, -800.0]),
    ],
    ids=str,
)
async def test_what_is_made_of_scores_is_the_models_and_can_be_left_out(
    server: Server, engine: FakeEngine, changes: dict[str, Any], expected: list[float]
) -> None:
    engine.script = gives([[1.0, 3.0, -800.0]])
    async with server.of(TEXTS, **changes) as http:
        (own,) = (await post(http, CLASSIFY, "a"))["data"]
        (plain,) = (await post(http, CLASSIFY, "a", use_activation=False))["data"]
    assert own["probs"] == pytest.approx(expected)
    assert plain["probs"] == [1.0, 3.0, -800.0]
    assert own["label"] == plain["label"] == "glad"


async def test_padding_at_the_end_is_not_computed_but_counted(server: Server, engine: FakeEngine) -> None:
    engine.script = pools(len(LABELS))
    async with server.of(TEXTS) as http:
        answer = await post(http, CLASSIFY, [[5, PAD, 6, PAD, PAD], [7, 8]], use_activation=False)
    assert [sample.token_ids for sample in engine.submitted] == [[5, PAD, 6], [7, 8]]
    assert [own["probs"] for own in answer["data"]] == [states(token_id, 3).tolist() for token_id in (6, 8)]
    assert answer["usage"]["prompt_tokens"] == 7


async def test_every_token_gets_a_label_and_says_where_it_stands(
    server: Server, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.script = pools(len(LABELS))
    text = "Is \u2603 a snowman?"
    ids = tokenizer.encode(text)
    async with server.of(OF_TOKENS) as http:
        answer = await post(http, TOKENS, [text, "Hi"])
    first, second = answer["data"]
    assert [sample.whole.pooling for sample in engine.submitted] == ["all", "all"]
    assert all(sample.whole.scores for sample in engine.submitted)
    assert [own["token_id"] for own in first["tokens"]] == ids
    for own in first["tokens"]:
        scores = states(own["token_id"], 3)
        assert own["probs"] == pytest.approx(softmax(scores))
        assert own["label"] == LABELS[scores.argmax()]
    begin, *words = first["tokens"]
    assert (begin["token"], begin["text_offset"]) == ("|ENDOFTEXT|", 0)
    whole = [own for own in words if not own["token"].startswith("bytes:")]
    assert len(whole) < len(words)
    for own in whole:
        assert text[own["text_offset"] :].startswith(own["token"])
    assert [own["text_offset"] for own in words] == sorted(own["text_offset"] for own in words)
    assert (first["index"], second["index"], first["num_classes"]) == (0, 1, 3)
    assert answer["usage"]["prompt_tokens"] == len(ids) + len(tokenizer.encode("Hi"))


@pytest.mark.parametrize(
    ("served", "refused", "hint"),
    [
        (Architecture.CAUSAL_LM, ("POST /classify", "POST /classify/tokens"), "/v1/completions"),
        (TEXTS, (*GENERATE, "POST /classify/tokens"), "/classify"),
        (OF_TOKENS, (*GENERATE, "POST /classify"), "/classify/tokens"),
    ],
)
async def test_a_model_of_another_kind_is_refused_with_what_to_use(
    server: Server, engine: FakeEngine, served: Architecture, refused: Sequence[str], hint: str
) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "a"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
        "/api": {"prompts": ["a"]},
        CLASSIFY: {"input": "a"},
        TOKENS: {"input": "a"},
    }
    changes = {} if served is Architecture.CAUSAL_LM else {"problem_type": None}
    async with server.of(served, **changes) as http:
        for endpoint in refused:
            method, path = endpoint.split()
            response = await http.request(method, path, json=bodies[path])
            assert response.status_code == 400, endpoint
            error = response.json()["error"]
            assert (error["code"], error["param"]) == ("unsupported_by_model", "model")
            assert f"use {hint}" in error["message"]
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": [[4096]]}, 400, "input"),
        ({"input": "a", "model": "other"}, 404, "model"),
        ({"input": "a", "activation": True}, 400, "activation"),
        ({"input": "a", "encoding_format": "base64"}, 400, "encoding_format"),
    ],
    ids=str,
)
async def test_what_cannot_be_is_refused_by_name(
    server: Server, engine: FakeEngine, body: dict[str, Any], status: int, param: str
) -> None:
    async with server.of(TEXTS) as http:
        response = await http.post(CLASSIFY, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert engine.submitted == []
