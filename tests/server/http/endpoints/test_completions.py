import random
from collections.abc import Callable

import httpx
import pytest

from persimmon.model.sampling_params import SamplingParams
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.client import EngineClient
from persimmon.server.engine.messages import SequenceOutput
from tests.server.http.fake_engine import ONLY_TEXT, FakeEngine, Sample, outputs, says

pytestmark = pytest.mark.anyio

EOS = 1
Tokens = Callable[[str], list[int]]


async def complete(http: httpx.AsyncClient, **body: object) -> dict:
    response = await http.post("/v1/completions", json={"prompt": "Hello", **body})
    assert response.status_code == 200, response.text
    return response.json()


async def test_a_completion_has_openais_shape(http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens) -> None:
    engine.script = says(tokens("a sweet fruit"), EOS, cached_tokens=2)
    answer = await complete(http, prompt="What is it?", max_tokens=100)
    prompt = engine.submitted[0].token_ids
    assert answer.pop("id").startswith("cmpl-")
    assert abs(answer.pop("created") - 1_700_000_000) < 10**9
    assert answer.pop("system_fingerprint").startswith("fp_")
    completion_tokens = len(tokens("a sweet fruit")) + 1
    assert answer == {
        "object": "text_completion",
        "model": "demo",
        "choices": [{"index": 0, "text": " a sweet fruit", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": completion_tokens,
            "total_tokens": len(prompt) + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": 2, "audio_tokens": 0},
            "completion_tokens_details": ONLY_TEXT,
        },
    }


async def test_a_text_prompt_is_tokenized_with_bos(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer, tokens: Tokens
) -> None:
    engine.script = says([EOS])
    await complete(http, prompt="A dog.")
    assert engine.submitted[0].token_ids == [tokenizer.bos_token_id, *tokens("A dog.")]


async def test_an_empty_text_is_the_bos_token_alone(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = says([9])
    await complete(http, prompt="")
    assert engine.submitted[0].token_ids == [1]


async def test_a_long_text_is_tokenized_like_a_short_one(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says([9])
    text = "internationalization " * 900  # more characters than are tokenized on the event loop
    response = await http.post("/v1/completions", json={"prompt": text})
    counted = len(tokens(text)) + 1
    assert f"({counted} in the prompt" in response.json()["error"]["message"]


async def test_every_form_of_prompt_reaches_the_engine_in_order(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says([9])
    await complete(http, prompt=[5, 6, 7])
    await complete(http, prompt=[[5, 6], [7]])
    await complete(http, prompt=["A", "B"])
    assert [submit.token_ids for submit in engine.submitted] == [
        [5, 6, 7],
        [5, 6],
        [7],
        [1, *tokens("A")],
        [1, *tokens("B")],
    ]


async def test_sampling_fields_reach_the_engine(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = says([9])
    await complete(http, temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, seed=7, max_tokens=3)
    submit = engine.submitted[0]
    assert submit.sampling == SamplingParams(temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, seed=7)
    assert submit.max_tokens == 3
    assert submit.stop_token_ids == [EOS]


async def test_a_priority_reaches_the_engine(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = says([9])
    await complete(http, priority=-3, n=2)
    await complete(http)
    assert [submit.whole.priority for submit in engine.submitted] == [-3, -3, 0]


async def test_defaults_are_openais(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = says([9])
    await complete(http)
    submit = engine.submitted[0]
    assert submit.max_tokens == 16
    assert submit.sampling == SamplingParams(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed=submit.sampling.seed)


async def test_the_default_max_tokens_is_no_more_than_the_context_leaves(
    http: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = says([9])
    await complete(http, prompt=[5] * 2040)
    assert engine.submitted[0].max_tokens == 8


@pytest.mark.parametrize("top_k", [0, -1, 4096, 10**30])
async def test_a_top_k_that_keeps_every_token_is_no_top_k(
    http: httpx.AsyncClient, engine: FakeEngine, top_k: int
) -> None:
    engine.script = says([9])
    await complete(http, top_k=top_k)
    assert engine.submitted[0].sampling.top_k == 0


@pytest.mark.parametrize("seed", [-1, 2**63, -(10**40), 10**40])
async def test_any_seed_is_taken_into_the_engines_range(http: httpx.AsyncClient, engine: FakeEngine, seed: int) -> None:
    engine.script = says([9])
    await complete(http, seed=seed)
    await complete(http, seed=seed)
    first, second = (submit.sampling.seed for submit in engine.submitted)
    assert first == second == seed % 2**63


async def test_prompts_without_a_seed_get_one_each_from_the_servers_own(
    http: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = says([9])
    await complete(http, prompt=["same", "same"])
    await complete(http)
    expected = random.Random(0)
    assert [submit.sampling.seed for submit in engine.submitted] == [expected.randrange(2**63) for _ in range(3)]


async def test_stop_tokens_end_an_answer_and_are_no_part_of_its_text(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Callable[[str], list[int]]
) -> None:
    first, second = tokens("persimmon tree")[:1], tokens("galaxy")[-1:]
    engine.script = says(first, eos=second[0])
    answer = await complete(http, stop_token_ids=[second[0], EOS, second[0]], return_token_ids=True)
    assert engine.submitted[0].stop_token_ids == [second[0], EOS]
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["token_ids"] == [*first, *second]
    assert "galaxy" not in choice["text"]
    assert answer["usage"]["completion_tokens"] == 2


async def test_stop_tokens_hold_with_ignore_eos(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = says([9])
    await complete(http, stop_token_ids=[5], ignore_eos=True)
    assert engine.submitted[0].stop_token_ids == [5]


@pytest.mark.parametrize("token_id", [-1, 4096, 2**70])
async def test_a_stop_token_outside_the_vocabulary_is_refused(
    http: httpx.AsyncClient, engine: FakeEngine, token_id: int
) -> None:
    response = await http.post("/v1/completions", json={"prompt": "Hello", "stop_token_ids": [5, token_id]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "stop_token_ids"
    assert engine.submitted == []


async def test_ignore_eos_leaves_no_stop_token(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = says([9, EOS, 9])
    answer = await complete(http, ignore_eos=True, max_tokens=3)
    assert engine.submitted[0].stop_token_ids == []
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_choices_are_numbered_by_prompt_then_sample(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    def script(submit: Sample) -> list[SequenceOutput]:
        name = f"{submit.token_ids[0]}:{submit.index}"
        return outputs(submit.sequence_id, [[token] for token in tokens(name)], cached_tokens=1)

    engine.script = script
    answer = await complete(http, prompt=[[5], [6], [7]], n=2, seed=3)
    texts = [(choice["index"], choice["text"]) for choice in answer["choices"]]
    assert texts == [(0, " 5:0"), (1, " 5:1"), (2, " 6:0"), (3, " 6:1"), (4, " 7:0"), (5, " 7:1")]
    assert {submit.sampling.seed for submit in engine.submitted} == {3}
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == sum(len(tokens(text[1:])) for _, text in texts)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 3


async def test_token_ids_come_when_asked_for(http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens) -> None:
    engine.script = says(tokens("yes"), EOS)
    answer = await complete(http, prompt=[5, 6], return_token_ids=True)
    choice = answer["choices"][0]
    assert choice["prompt_token_ids"] == [5, 6]
    assert choice["token_ids"] == [*tokens("yes"), EOS]
    assert choice["text"] == " yes"


async def test_a_stop_string_across_tokens_ends_the_sequence_and_stays_out(
    http: httpx.AsyncClient, engine: FakeEngine, engine_client: EngineClient, tokens: Tokens
) -> None:
    before, stop, after = tokens("one two")[:], tokens("STOP")[1:], tokens("never seen")
    assert len(stop) > 1
    engine.script = says([*before, *stop, *after])
    answer = await complete(http, stop=["STOP"], max_tokens=50, return_token_ids=True)
    assert answer["choices"][0]["text"] == " one two"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["token_ids"] == [*before, *stop]
    assert answer["usage"]["completion_tokens"] == len(before) + len(stop)
    assert engine_client.open_streams == 0


async def test_a_stop_string_within_one_output_counts_no_token_after_it(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    ids = tokens("one STOP two")
    engine.script = lambda submit: outputs(submit.sequence_id, [ids])
    answer = await complete(http, stop="STOP", max_tokens=50)
    assert answer["choices"][0]["text"] == " one "
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < len(ids)


async def test_a_stop_string_aborts_the_sequence_on_the_engine(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    ids = tokens("STOP")
    engine.script = lambda submit: [SequenceOutput(submit.sequence_id, ids)]
    answer = await complete(http, stop="STOP")
    assert answer["choices"][0]["text"] == " "
    assert await engine.aborts(1) == [engine.submitted[0].sequence_id]


async def test_text_that_only_began_like_a_stop_string_is_given_out_at_the_end(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says(tokens("one ST"), EOS)
    answer = await complete(http, stop="STOP", max_tokens=50)
    assert answer["choices"][0]["text"] == " one ST"
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_an_unfinished_character_at_the_end_is_a_replacement_character(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    ids = tokens("🙂")
    engine.script = says(ids[:-1])
    answer = await complete(http, max_tokens=len(ids) - 1)
    assert answer["choices"][0]["text"] == " \N{REPLACEMENT CHARACTER}"
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_a_sequence_that_the_engine_gives_up_fails_its_own_request_alone(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = lambda submit: [SequenceOutput(submit.sequence_id, [], "error", error="It cannot be run.")]
    response = await http.post("/v1/completions", json={"prompt": "Hello", "n": 2})
    assert response.status_code == 500
    assert response.json() == {
        "error": {
            "message": "It cannot be run.",
            "type": "server_error",
            "param": None,
            "code": "generation_failed",
        }
    }
    engine.script = says(tokens("fine"))
    assert (await complete(http))["choices"][0]["text"] == " fine"


async def test_when_one_sample_fails_the_others_are_aborted(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    def script(submit: Sample) -> list[SequenceOutput]:
        failed = SequenceOutput(submit.sequence_id, [], "error", error="It cannot be run.")
        return [failed] if submit.index == 2 else []

    engine.script = script
    response = await http.post("/v1/completions", json={"prompt": "Hello", "n": 3})
    assert response.status_code == 500
    assert sorted(await engine.aborts(2)) == [submit.sequence_id for submit in engine.submitted[:2]]
