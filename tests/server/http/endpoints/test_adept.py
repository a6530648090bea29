"""PUT /api on a fake engine: what each of Adept's fields asks of it, and the answer in Adept's form."""

from typing import Any

import httpx
import pytest

from persimmon.model.config import PersimmonConfig
from persimmon.model.sampling_params import SamplingParams
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.client import EngineClient
from persimmon.server.http.app import create_app
from tests.server.http.fake_engine import MAX_MODEL_LEN, FakeEngine, says
from tests.server.http.generation.test_logprobs import reporting

pytestmark = pytest.mark.anyio

EOS = 1
PROMPT = "human: Hello, how are you?\n\nadept:"
ANSWER = "I am a tiny model."


async def put(http: httpx.AsyncClient, prompts: object = (PROMPT,), **fields: Any) -> dict[str, Any]:
    prompts = list(prompts) if isinstance(prompts, tuple) else prompts
    response = await http.put("/api", json={"prompts": prompts} | fields)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.fixture
def answer(engine: FakeEngine, tokenizer: Tokenizer) -> list[int]:
    """The tokens that the engine answers, before the end of text."""
    ids = tokenizer.encode(ANSWER, add_bos=False)
    engine.script = says(ids, EOS)
    return ids


def readable(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    first, *others = (piece.replace("\u2581", " ") for piece in tokenizer.pieces(ids))
    return [first.removeprefix(" "), *others]


@pytest.mark.usefixtures("answer")
async def test_the_request_in_adepts_readme_is_answered_in_its_form(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer, answer: list[int]
) -> None:
    body = (
        rb'{"prompts": ["human: Hello, how are you?\n\nadept:"], "tokens_to_generate": 128, "top_p": 0.9, '
        rb'"random_seed": 1234, "logprobs": false}'
    )
    headers = {"Content-Type": "application/json; charset=UTF-8"}
    response = await http.put("/api", content=body, headers=headers)
    assert response.status_code == 200
    assert response.json() == {
        "text": [f"{PROMPT} {ANSWER}|ENDOFTEXT|"],
        "logprobs": None,
        "generations": [f"{ANSWER}|ENDOFTEXT|"],
        "human_readable_tokens": [[*readable(tokenizer, answer), "|ENDOFTEXT|"]],
    }
    [asked] = engine.submitted
    assert asked.token_ids == tokenizer.encode(PROMPT, add_bos=False)
    assert (asked.max_tokens, asked.stop_token_ids) == (128, [EOS])
    assert asked.sampling == SamplingParams(temperature=1.0, top_p=0.9, seed=1234)


@pytest.mark.usefixtures("answer")
@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({}, SamplingParams(temperature=1.0)),
        ({"temperature": 100}, SamplingParams(temperature=100.0)),
        ({"top_k": 1, "temperature": 7.5}, SamplingParams(temperature=0.0, top_k=1)),
        ({"top_k": 40, "top_p": 0.0}, SamplingParams(temperature=1.0, top_k=40)),
        ({"top_p": 1.0, "top_k": 0}, SamplingParams(temperature=1.0)),
        ({"no_log": True, "temperature": 0.5}, SamplingParams(temperature=0.5)),
        (
            {"beam_width": None, "stop_on_eol": False, "stop_on_double_eol": False, "top_p_decay": 0.0},
            SamplingParams(temperature=1.0),
        ),
    ],
    ids=str,
)
async def test_draws_are_as_adepts_fields_say(
    http: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], sampling: SamplingParams
) -> None:
    await put(http, random_seed=5, **fields)
    [asked] = engine.submitted
    assert asked.sampling == SamplingParams(
        temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, seed=5
    )
    assert asked.max_tokens == 64


@pytest.mark.usefixtures("answer")
async def test_without_a_seed_each_prompt_gets_one_of_its_own(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    await put(http, ("a", "a"))
    first, second = engine.submitted
    assert first.sampling.seed != second.sampling.seed


@pytest.mark.usefixtures("answer")
async def test_several_prompts_are_answered_in_their_order_and_one_may_come_alone(
    http: httpx.AsyncClient, tokenizer: Tokenizer
) -> None:
    several = await put(http, ("One", "Another one", "Two"), tokens_to_generate=3)
    begun = tokenizer.decode(tokenizer.encode(ANSWER, add_bos=False)[:3], from_start=True)
    assert several["text"] == [f"{prompt} {begun}" for prompt in ("One", "Another one", "Two")]
    assert several["generations"] == [begun] * 3
    alone = await put(http, "One", tokens_to_generate=3)
    assert {name: value and value[:1] for name, value in several.items()} == alone


@pytest.mark.usefixtures("answer")
async def test_a_beginning_token_comes_on_request_alone_and_is_written_out(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    with_bos = await put(http, ("Hello", ""), add_BOS=True, tokens_to_generate=1)
    assert [sample.token_ids for sample in engine.submitted] == [tokenizer.encode("Hello", add_bos=True), [EOS]]
    assert with_bos["text"] == ["|ENDOFTEXT| Hello I", "|ENDOFTEXT| I"]
    assert with_bos["generations"] == ["I", "I"]


async def test_a_vocabulary_without_a_beginning_token_has_none_to_add(
    engine_client: EngineClient, config: PersimmonConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "bos_token_id", None)
    transport = httpx.ASGITransport(create_app(engine_client, tokenizer, config, "demo"))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
        response = await http.put("/api", json={"prompts": "a", "add_BOS": True})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "add_BOS")


async def test_logprobs_are_of_every_token_but_the_first(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.script = reporting([*tokenizer.encode(ANSWER, add_bos=False), EOS], "stop")
    answer = await put(http, (PROMPT, "Hi there"), logprobs=True)
    for sample, own in zip(engine.submitted, answer["logprobs"], strict=True):
        ids = tokenizer.encode(ANSWER, add_bos=False)
        assert (sample.whole.prompt_logprobs, sample.sampling.logprobs) == (0, 0)
        # The engine's figures tell token and place.
        assert own == pytest.approx([-token_id for token_id in sample.token_ids[1:]] + _figures([*ids, EOS]))
    assert answer["text"][1] == f"Hi there {ANSWER}|ENDOFTEXT|"


def _figures(ids: list[int]) -> list[float]:
    return [-(token_id + place / 100) for place, token_id in enumerate(ids)]


async def test_no_new_tokens_only_score_the_prompts(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.script = reporting([])
    answer = await put(http, (PROMPT,), tokens_to_generate=0, logprobs=True)
    ids = tokenizer.encode(PROMPT, add_bos=False)
    assert answer == {
        "text": [PROMPT],
        "logprobs": [[-float(token_id) for token_id in ids[1:]]],
        "generations": [],
        "human_readable_tokens": [],
    }
    assert engine.submitted[0].max_tokens == 0


@pytest.mark.usefixtures("answer")
async def test_tokens_beyond_the_context_are_not_generated(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    await put(http, ("a", "a " * 1000), tokens_to_generate=100_000)
    short, long = engine.submitted
    assert long.max_tokens == MAX_MODEL_LEN - len(long.token_ids) == short.max_tokens
    response = await http.put("/api", json={"prompts": ["a", "word " * 5000]})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompts[1]")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompts"),
        ({"prompts": []}, "prompts"),
        ({"prompts": [5]}, "prompts"),
        ({"prompts": ["a"] * 129}, "prompts"),
        ({"prompts": ["a", ""]}, "prompts"),
        ({"prompts": "a", "tokens_to_generate": -1}, "tokens_to_generate"),
        ({"prompts": "a", "tokens_to_generate": 1.5}, "tokens_to_generate"),
        ({"prompts": "a", "tokens_to_generate": 0}, "tokens_to_generate"),
        ({"prompts": "a", "logprobs": 1}, "logprobs"),
        ({"prompts": "a", "temperature": 0}, "temperature"),
        ({"prompts": "a", "temperature": 100.5}, "temperature"),
        ({"prompts": "a", "top_k": 1001}, "top_k"),
        ({"prompts": "a", "top_p": 1.1}, "top_p"),
        ({"prompts": "a", "top_p": 0.5, "top_k": 5}, "top_p"),
        ({"prompts": "a", "add_BOS": "yes"}, "add_BOS"),
        ({"prompts": "a", "add_bos": True}, "add_bos"),
        ({"prompts": "a", "random_seed": -1}, "random_seed"),
        ({"prompts": "a", "no_log": "no"}, "no_log"),
        ({"prompts": "a", "beam_width": 2}, "beam_width"),
        ({"prompts": "a", "stop_on_eol": True}, "stop_on_eol"),
        ({"prompts": "a", "top_p_decay": 0.1}, "top_p_decay"),
        ({"prompts": "a", "tokens": 5}, "tokens"),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_what_cannot_be_is_a_400_that_names_the_field(
    http: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any], param: str
) -> None:
    response = await http.put("/api", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert engine.submitted == []


@pytest.mark.parametrize(("old", "new"), [("max_len", "tokens_to_generate"), ("sentences", "prompts")])
async def test_a_field_that_adept_has_renamed_is_refused_with_its_new_name(
    http: httpx.AsyncClient, old: str, new: str
) -> None:
    response = await http.put("/api", json={"prompts": "a", old: 5})
    assert response.status_code == 400
    assert f"'{old}'" in response.json()["error"]["message"]
    assert f"use {new}." in response.json()["error"]["message"]


async def test_its_health_check_says_what_ours_says(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    response = await http.get("/healthz")
    assert (response.status_code, response.json()) == (200, {"success": True})


async def test_its_health_check_says_no_while_the_model_loads(
    engine: FakeEngine, tokenizer: Tokenizer, config: PersimmonConfig
) -> None:
    transport = httpx.ASGITransport(create_app(EngineClient(engine.address), tokenizer, config, "demo"))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
        response = await http.get("/healthz")
    assert (response.status_code, response.json()) == (503, {"success": False})
