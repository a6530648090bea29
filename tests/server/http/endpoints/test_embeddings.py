"""/v1/embeddings on a fake engine: what is asked of it, and what happens to its numbers."""

import base64
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from persimmon.model.config import Architecture, PersimmonConfig
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.client import EngineClient
from persimmon.server.engine.messages import SequenceOutput
from persimmon.server.http.endpoints.pooling import MAX_RUNNING
from persimmon.server.http.endpoints.service import MAX_CHOICES
from tests.server.http.conftest import LiveServer
from tests.server.http.fake_engine import MAX_MODEL_LEN, FakeEngine, Sample
from tests.server.http.pooling import LABELS, gives, model_of, pools, serving, states
from tests.server.http.transport.test_disconnect import request

pytestmark = pytest.mark.anyio

EMBEDDINGS = "/v1/embeddings"


async def embed(http: httpx.AsyncClient, given: object, **fields: Any) -> dict[str, Any]:
    response = await http.post(EMBEDDINGS, json={"input": given, "normalize": False} | fields)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.fixture
def width(config: PersimmonConfig, engine: FakeEngine) -> int:
    engine.script = pools(config.hidden_size)
    return config.hidden_size


async def test_an_embedding_is_the_state_of_the_last_token(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer, width: int
) -> None:
    ids = tokenizer.encode("A persimmon")
    answer = await embed(http, "A persimmon", model="demo", user="someone")
    assert answer == {
        "object": "list",
        "model": "demo",
        "data": [{"object": "embedding", "index": 0, "embedding": states(ids[-1], width).tolist()}],
        "usage": {"prompt_tokens": len(ids), "total_tokens": len(ids)},
    }
    [asked] = engine.submitted
    assert (asked.token_ids, asked.max_tokens, asked.whole.pooling, asked.whole.scores) == (ids, 0, "last", False)


async def test_or_the_mean_of_all_tokens(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer, width: int
) -> None:
    ids = tokenizer.encode("What is a persimmon?")
    (own,) = (await embed(http, "What is a persimmon?", pooling="mean"))["data"]
    assert own["embedding"] == pytest.approx(np.mean([states(id, width) for id in ids], axis=0).tolist(), abs=1e-6)
    assert engine.submitted[0].whole.pooling == "sum"


@pytest.mark.parametrize("pooling", ["last", "mean"])
async def test_it_has_length_one_unless_the_request_says_otherwise(
    http: httpx.AsyncClient, width: int, pooling: str
) -> None:
    plain = np.array((await embed(http, "What is it?", pooling=pooling))["data"][0]["embedding"])
    for wish in ({}, {"normalize": True}, {"use_activation": True}):
        response = await http.post(EMBEDDINGS, json={"input": "What is it?", "pooling": pooling} | wish)
        scaled = response.json()["data"][0]["embedding"]
        assert scaled == pytest.approx((plain / np.linalg.norm(plain)).tolist(), abs=1e-6)
    response = await http.post(EMBEDDINGS, json={"input": "What is it?", "pooling": pooling, "use_activation": False})
    assert response.json()["data"][0]["embedding"] == plain.tolist()


async def test_a_state_of_zeros_stays_one(http: httpx.AsyncClient, engine: FakeEngine, config: PersimmonConfig) -> None:
    engine.script = gives(np.zeros((1, config.hidden_size)))
    assert (await embed(http, "a", normalize=True))["data"][0]["embedding"] == [0.0] * config.hidden_size


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("Hi", ["Hi"]),
        (["Hi", "you"], ["Hi", "you"]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6, 7], [8]], [[5, 6, 7], [8]]),
    ],
)
async def test_inputs_are_texts_or_token_ids_and_answers_are_in_their_order(
    http: httpx.AsyncClient, tokenizer: Tokenizer, width: int, given: object, prompts: list[str | list[int]]
) -> None:
    ids = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    answer = await embed(http, given)
    assert [own["index"] for own in answer["data"]] == list(range(len(ids)))
    assert [own["embedding"] for own in answer["data"]] == [states(own[-1], width).tolist() for own in ids]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))


async def test_base64_is_of_little_endian_float32(http: httpx.AsyncClient, width: int) -> None:
    (own,) = (await embed(http, [9], encoding_format="base64"))["data"]
    assert np.frombuffer(base64.b64decode(own["embedding"]), "<f4").tolist() == states(9, width).tolist()


async def test_the_official_client_asks_for_base64_and_gives_floats(server: LiveServer, width: int) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        extra = {"normalize": False}
        default = await client.embeddings.create(model="demo", input=[9, 8], extra_body=extra)
        floats = await client.embeddings.create(model="demo", input=[9, 8], encoding_format="float", extra_body=extra)
    assert default.data[0].embedding == floats.data[0].embedding == states(8, width).tolist()
    assert default.usage.total_tokens == 2


async def test_special_tokens_are_left_out_on_request(
    engine: FakeEngine, engine_client: EngineClient, config: PersimmonConfig, width: int
) -> None:
    from tests.server.http.conftest import DEMO

    beginning = Tokenizer.from_folder(DEMO, add_bos=True)
    async with serving(engine_client, beginning, config) as http:
        await embed(http, "Hello")
        await embed(http, "Hello", add_special_tokens=False)
    with_bos, without = (sample.token_ids for sample in engine.submitted)
    assert with_bos == [beginning.bos_token_id, *without]


@pytest.mark.parametrize("architecture", list(Architecture))
async def test_every_kind_of_model_embeds(
    engine_client: EngineClient, tokenizer: Tokenizer, config: PersimmonConfig, width: int, architecture: Architecture
) -> None:
    async with serving(engine_client, tokenizer, model_of(config, architecture)) as http:
        assert len((await embed(http, "Hello"))["data"][0]["embedding"]) == width
        (model,) = (await http.get("/v1/models")).json()["data"]
    tasks = dict(zip(Architecture, ("generate", "classify", "token_classify"), strict=True))
    labels = None if architecture is Architecture.CAUSAL_LM else list(LABELS)
    assert (model["task"], model.get("labels")) == (tasks[architecture], labels)


async def test_the_hidden_size_is_the_one_number_of_dimensions(http: httpx.AsyncClient, width: int) -> None:
    assert len((await embed(http, "a", dimensions=width))["data"][0]["embedding"]) == width
    response = await http.post(EMBEDDINGS, json={"input": "a", "dimensions": 8})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "dimensions"
    assert str(width) in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": "", "add_special_tokens": False}, "input"),
        ({"input": ["a", ""], "add_special_tokens": False}, "input[1]"),
        ({"input": [[5], [4096]]}, "input[1]"),
        ({"input": [[5], []]}, "input"),
        ({"input": ["a", [5]]}, "input"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "pooling": "cls"}, "pooling"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "normalize": True, "use_activation": False}, "use_activation"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": MAX_MODEL_LEN + 1}, "truncate_prompt_tokens"),
        ({"input": "a", "truncation_side": "middle"}, "truncation_side"),
        ({"input": "a", "embed_dtype": "float16"}, "embed_dtype"),
        ({"input": "a", "messages": [{"role": "user", "content": "a"}]}, "messages"),
        ({"input": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
        ({"input": [5] * (MAX_MODEL_LEN + 1)}, "input"),
        ({"input": ["a"] * (MAX_CHOICES + 1)}, "input"),
    ],
    ids=str,
)
async def test_what_cannot_be_is_refused_by_name(
    http: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any], param: str
) -> None:
    response = await http.post(EMBEDDINGS, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert engine.submitted == []


async def test_a_conversation_is_embedded_without_the_beginning_of_an_answer(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer, width: int
) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    for body, text in (
        ({}, "Be brief.\n\nhuman: Hi"),
        ({"add_generation_prompt": True}, "Be brief.\n\nhuman: Hi\n\nadept:"),
    ):
        answer = await http.post(EMBEDDINGS, json={"messages": messages, **body})
        assert answer.status_code == 200, answer.text
        assert engine.submitted[-1].token_ids == tokenizer.encode(text)
        assert len(answer.json()["data"]) == 1


async def test_a_prompt_may_fill_the_context(http: httpx.AsyncClient, width: int) -> None:
    answer = await embed(http, [5] * MAX_MODEL_LEN)
    assert answer["usage"]["prompt_tokens"] == MAX_MODEL_LEN


async def test_the_engine_has_a_bounded_part_of_a_long_list(http: httpx.AsyncClient, width: int) -> None:
    given = [[1 + index % 4000] for index in range(3 * MAX_RUNNING)]
    answer = await embed(http, given)
    assert [own["embedding"] for own in answer["data"]] == [states(own[0], width).tolist() for own in given]


async def test_a_client_that_leaves_has_its_inputs_aborted_and_no_more_submitted(
    server: LiveServer, engine: FakeEngine, engine_client: EngineClient
) -> None:
    async with request(server, EMBEDDINGS, input=["a"] * (2 * MAX_RUNNING), prompt=None, messages=None):
        await engine.submissions(MAX_RUNNING)
    assert sorted(await engine.aborts(MAX_RUNNING)) == [sample.sequence_id for sample in engine.submitted]
    assert len(engine.submitted) == MAX_RUNNING
    assert engine_client.open_streams == 0


async def test_one_input_that_fails_fails_the_request_and_ends_the_others(
    http: httpx.AsyncClient, engine: FakeEngine, engine_client: EngineClient
) -> None:
    def script(sample: Sample) -> list[SequenceOutput]:
        if len(engine.submitted) == 1:
            return [SequenceOutput(sample.sequence_id, [], "error", error="the model failed on this request")]
        return []

    engine.script = script
    response = await http.post(EMBEDDINGS, json={"input": ["a", "b", "c"]})
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the model failed on this request"
    assert sorted(await engine.aborts(2)) == [sample.sequence_id for sample in engine.submitted[1:]]
    assert engine_client.open_streams == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
async def test_numbers_that_are_none_are_an_error(
    http: httpx.AsyncClient, engine: FakeEngine, config: PersimmonConfig, value: float
) -> None:
    engine.script = gives(np.full((1, config.hidden_size), value))
    response = await http.post(EMBEDDINGS, json={"input": "a"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "generation_failed"
