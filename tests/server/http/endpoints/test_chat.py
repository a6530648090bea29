from collections.abc import Callable

import httpx
import pytest

from tests.server.http.fake_engine import MAX_MODEL_LEN, ONLY_TEXT, FakeEngine, says

pytestmark = pytest.mark.anyio

EOS = 1
Tokens = Callable[[str], list[int]]
ASK = [{"role": "user", "content": "Hi"}]


async def chat(http: httpx.AsyncClient, **body: object) -> dict:
    response = await http.post("/v1/chat/completions", json={"messages": ASK, **body})
    assert response.status_code == 200, response.text
    return response.json()


async def test_an_answer_has_openais_shape_and_not_the_formats_space(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says(tokens("Hello!"), EOS, cached_tokens=1)
    answer = await chat(http)
    assert answer.pop("id").startswith("chatcmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer.pop("system_fingerprint").startswith("fp_")
    prompt_tokens, completion_tokens = len(engine.submitted[0].token_ids), len(tokens("Hello!")) + 1
    assert answer == {
        "object": "chat.completion",
        "model": "demo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello!", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": 1, "audio_tokens": 0},
            "completion_tokens_details": ONLY_TEXT,
        },
    }


async def test_messages_become_the_models_own_format(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says([9], EOS)
    earlier: dict = {"role": "assistant", "content": "It is.", "refusal": None, "tool_calls": None, "annotations": []}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    await chat(http, messages=[{"role": "user", "content": "Is it?"}, earlier, {"role": "user", "content": parts}])
    text = "human: Is it?\n\nadept: It is.\n\nhuman: one\ntwo\n\nadept:"
    assert engine.submitted[0].token_ids == [1, *tokens(text)]


async def test_without_a_limit_the_answer_may_fill_the_context(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = says([9], EOS)
    await chat(http)
    submit = engine.submitted[0]
    assert submit.max_tokens == MAX_MODEL_LEN - len(submit.token_ids)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_both_names_of_the_limit_hold(http: httpx.AsyncClient, engine: FakeEngine, field: str) -> None:
    engine.script = says([9, 9, 9, 9])
    answer = await chat(http, **{field: 3})
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_an_answer_ends_before_a_new_human_turn(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says(tokens("Yes.\n\nhuman: And?"))
    answer = await chat(http, stop=["never"])
    assert answer["choices"][0]["message"]["content"] == "Yes."
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_ignore_eos_goes_on_past_a_new_human_turn_but_not_past_the_clients_own_stop(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says(tokens("Yes.\n\nhuman: And? END more"))
    answer = await chat(http, ignore_eos=True, stop="END")
    assert answer["choices"][0]["message"]["content"] == "Yes.\n\nhuman: And? "


async def test_stop_strings_are_looked_for_in_the_text_that_the_client_sees(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says(tokens("one two"))
    answer = await chat(http, stop=" ", max_tokens=50)
    assert answer["choices"][0]["message"]["content"] == "one"


async def test_token_ids_come_when_asked_for(http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens) -> None:
    engine.script = says(tokens("yes"), EOS)
    answer = await chat(http, return_token_ids=True, n=2)
    assert answer["prompt_token_ids"] == engine.submitted[0].token_ids
    assert [choice["token_ids"] for choice in answer["choices"]] == [[*tokens("yes"), EOS]] * 2
    assert answer["usage"]["prompt_tokens"] == len(engine.submitted[0].token_ids)
