"""What answers tell of their tokens: in OpenAI's shapes, whole and streamed, with and without the prompt."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest

from persimmon.model.sampling_params import SamplingParams
from persimmon.model.token_logprobs import TokenLogprobs
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.messages import SequenceOutput
from tests.server.http.fake_engine import FakeEngine, Sample

pytestmark = pytest.mark.anyio

EOS = 1
Tokens = Callable[[str], list[int]]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "Hi"}]}


def entry(token_id: int, *, place: int = 0, top: Sequence[int] = ()) -> TokenLogprobs:
    """A token with a figure that says which one and where."""
    return TokenLogprobs(
        token_id=token_id,
        logprob=_figure(token_id, place),
        top_ids=list(top),
        top_logprobs=[_figure(each, place) for each in top],
    )


def _figure(token_id: int, place: int) -> float:
    return -(token_id + place / 100)


def reporting(token_ids: Sequence[int], reason: str = "length", top: Sequence[int] = ()) -> Callable[..., Any]:
    """A script: these tokens one a step, with their figures; the prompt's in two parts before that."""

    def script(submit: Sample) -> list[SequenceOutput]:
        asked = submit.sampling.logprobs is not None
        steps = [
            SequenceOutput(
                submit.sequence_id,
                [token_id],
                reason if place == len(token_ids) - 1 else None,
                logprobs=[entry(token_id, place=place, top=top[: submit.sampling.logprobs])] if asked else [],
            )
            for place, token_id in enumerate(token_ids)
        ]
        if submit.whole.prompt_logprobs is None or submit.index:
            return steps
        prompt = [entry(token_id, top=top[: submit.whole.prompt_logprobs]) for token_id in submit.token_ids[1:]]
        parts = [SequenceOutput(submit.sequence_id, [], prompt_logprobs=part) for part in (prompt[:2], prompt[2:])]
        if submit.max_tokens == 0:
            return [parts[0], SequenceOutput(submit.sequence_id, [], "length", prompt_logprobs=prompt[2:])]
        return parts + steps

    return script


async def complete(http: httpx.AsyncClient, path: str = COMPLETIONS, **fields: Any) -> dict[str, Any]:
    body = (ASK if path == CHAT else {"prompt": "Hello"}) | {"max_tokens": 50} | fields
    response = await http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def stream(http: httpx.AsyncClient, path: str = COMPLETIONS, **fields: Any) -> list[dict[str, Any]]:
    body = (ASK if path == CHAT else {"prompt": "Hello"}) | {"max_tokens": 50, "stream": True} | fields
    response = await http.post(path, json=body)
    assert response.status_code == 200, response.text
    *events, done = response.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(each.removeprefix("data: ")) for each in events]


async def test_a_completion_tells_of_each_token_and_of_what_might_have_come(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens, tokenizer: Tokenizer
) -> None:
    ids, yes, no = tokens("a sweet fruit"), *tokens("of is")
    engine.script = reporting([*ids, EOS], "stop", top=[yes, no])
    answer = await complete(http, logprobs=2)
    assert engine.submitted[0].sampling.logprobs == 2
    assert engine.submitted[0].whole.prompt_logprobs is None
    choice = answer["choices"][0]
    reported = choice["logprobs"]
    assert reported["tokens"] == [*(tokenizer.decode([token_id]) for token_id in ids), "|ENDOFTEXT|"]
    assert "".join(reported["tokens"][:-1]) == choice["text"]
    assert reported["token_logprobs"] == [_figure(token_id, place) for place, token_id in enumerate([*ids, EOS])]
    # The token itself is always among them.
    assert reported["top_logprobs"][1] == {
        reported["tokens"][1]: _figure(ids[1], 1),
        " of": _figure(yes, 1),
        " is": _figure(no, 1),
    }
    lengths = [len(token) for token in reported["tokens"]]
    assert reported["text_offset"] == [sum(lengths[:place]) for place in range(len(lengths))]


async def test_logprobs_of_zero_tell_of_the_tokens_alone(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = reporting(tokens("of is"))
    reported = (await complete(http, logprobs=0))["choices"][0]["logprobs"]
    assert reported["top_logprobs"] == [{" of": reported["token_logprobs"][0]}, {" is": reported["token_logprobs"][1]}]


async def test_an_echo_tells_of_the_prompt_too(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens, tokenizer: Tokenizer
) -> None:
    prompt, ids = tokens("What is it?"), tokens("a fruit")
    engine.script = reporting(ids, top=[5])
    answer = await complete(http, prompt="What is it?", echo=True, logprobs=1)
    assert engine.submitted[0].whole.prompt_logprobs == 1
    choice = answer["choices"][0]
    assert choice["text"] == "What is it? a fruit"
    reported = choice["logprobs"]
    bos, *before = engine.submitted[0].token_ids
    assert (bos, before) == (tokenizer.bos_token_id, prompt)
    assert reported["tokens"][0] == "|ENDOFTEXT|"
    assert "".join(reported["tokens"][1:]) == choice["text"]
    assert reported["token_logprobs"][0] is None
    assert reported["top_logprobs"][0] is None
    assert reported["token_logprobs"][1:] == [
        *(_figure(token_id, 0) for token_id in prompt),
        *(_figure(token_id, place) for place, token_id in enumerate(ids)),
    ]
    for offset, token in zip(reported["text_offset"][1:], reported["tokens"][1:], strict=True):
        assert choice["text"][offset:].startswith(token)
    assert answer["usage"]["completion_tokens"] == len(ids)


async def test_an_echo_without_new_tokens_is_the_prompt_alone(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = reporting([])
    answer = await complete(http, prompt="What is it?", echo=True, logprobs=0, max_tokens=0)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("What is it?", "length")
    assert len(choice["logprobs"]["tokens"]) == len(tokens("What is it?")) + 1
    assert answer["usage"]["completion_tokens"] == 0


async def test_an_echo_needs_no_logprobs(http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens) -> None:
    engine.script = reporting(tokens("a fruit"))
    answer = await complete(http, prompt=["What?", "Who?"], echo=True)
    assert [choice["text"] for choice in answer["choices"]] == ["What? a fruit", "Who? a fruit"]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert all(submit.whole.prompt_logprobs is None for submit in engine.submitted)


async def test_every_sample_of_a_prompt_tells_of_it(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = reporting(tokens("a fruit"))
    whole = await complete(http, prompt="What is it?", echo=True, logprobs=0, n=3)
    reported = [choice["logprobs"] for choice in whole["choices"]]
    assert reported == [reported[0]] * 3
    pieces: list[list[str]] = [[], [], []]
    for chunk in await stream(http, prompt="What is it?", echo=True, logprobs=0, n=3):
        for choice in chunk["choices"]:
            pieces[choice["index"]] += choice["logprobs"]["tokens"] if choice["logprobs"] else []
    assert pieces == [reported[0]["tokens"]] * 3


@pytest.mark.parametrize("stop", [None, ["fru"], ["t i", "zzz"]])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_stream_tells_what_the_whole_answer_does(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens, path: str, stop: list[str] | None
) -> None:
    ids = tokens("a sweet 🙂 fruit it is")
    engine.script = reporting([*ids, EOS], "stop", top=ids[:2])
    asked: dict[str, Any] = {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": 2}
    whole = (await complete(http, path, stop=stop, **asked))["choices"][0]
    chunks = [chunk["choices"][0] for chunk in await stream(http, path, stop=stop, **asked)]
    reported = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
    if path == CHAT:
        assert [each for part in reported for each in part["content"]] == whole["logprobs"]["content"]
        text = whole["message"]["content"]
        said = b"".join(bytes(each["bytes"]) for each in whole["logprobs"]["content"]).decode()
        assert said == text if stop is None else said.startswith(text)
        assert all(len(each["top_logprobs"]) == 2 for each in whole["logprobs"]["content"])
    else:
        for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [each for part in reported for each in part[field]] == whole["logprobs"][field]
    # A token is not reported before its text has begun.
    shown = ""
    for chunk in chunks[:-1]:
        shown += chunk["text"] if path == COMPLETIONS else chunk["delta"].get("content", "")
        if chunk["logprobs"] and path == COMPLETIONS:
            assert all(offset < len(shown) for offset in chunk["logprobs"]["text_offset"])


async def test_bytes_of_a_character_are_told_one_by_one(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = reporting(tokens("🙂"))
    completion = (await complete(http, logprobs=0))["choices"][0]
    assert completion["logprobs"]["tokens"] == [" ", "bytes:\\xf0", "bytes:\\x9f", "bytes:\\x99", "bytes:\\x82"]
    assert completion["logprobs"]["text_offset"] == [0, 1, 1, 1, 1]
    chat = (await complete(http, CHAT, logprobs=True))["choices"][0]
    assert chat["message"]["content"] == "🙂"
    assert [each["bytes"] for each in chat["logprobs"]["content"]] == [[], [0xF0], [0x9F], [0x99], [0x82]]


async def test_a_chat_does_not_tell_of_what_ended_it(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = reporting([*tokens("of it."), EOS], "stop")
    (choice,) = (await complete(http, CHAT, logprobs=True))["choices"]
    assert [each["token"] for each in choice["logprobs"]["content"]] == ["of", " it", "."]
    assert choice["logprobs"]["refusal"] is None


async def test_a_probability_of_zero_can_be_written(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    nothing = TokenLogprobs(token_id=5, logprob=-math.inf, top_ids=[5], top_logprobs=[-math.inf])
    engine.script = lambda submit: [SequenceOutput(submit.sequence_id, [5], "length", logprobs=[nothing])]
    reported = (await complete(http, logprobs=1))["choices"][0]["logprobs"]
    assert reported["token_logprobs"] == [-9999.0]


async def test_the_best_of_several_samples_are_those_whose_tokens_are_most_probable(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    texts = ["good", "bad and very long", "best", "worst"]
    figures = [-2.0, -3.0, -1.0, -9.0]

    def script(submit: Sample) -> list[SequenceOutput]:
        ids = tokens(texts[submit.index])
        reported = [
            TokenLogprobs(token_id=token_id, logprob=figures[submit.index], top_ids=[], top_logprobs=[])
            for token_id in ids
        ]
        return [SequenceOutput(submit.sequence_id, ids, "length", logprobs=reported)]

    engine.script = script
    answer = await complete(http, best_of=4, n=3)
    # By the mean, so a long answer is no worse for its length.
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, " best"),
        (1, " good"),
        (2, " bad and very long"),
    ]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == sum(len(tokens(text)) for text in texts)
    (submit,) = {id(sample.whole): sample.whole for sample in engine.submitted}.values()
    assert submit.samples == 4


async def test_best_of_n_is_nothing_special(http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens) -> None:
    engine.script = reporting(tokens("yes"))
    chunks = await stream(http, best_of=2, n=2)
    assert {choice["index"] for chunk in chunks for choice in chunk["choices"]} == {0, 1}
    assert engine.submitted[0].sampling.logprobs is None


async def test_what_changes_logits_reaches_the_engine(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = reporting([5])
    await complete(
        http,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.5,
        logit_bias={"5": -100, "7": 2.5},
        min_tokens=3,
        seed=1,
    )
    assert engine.submitted[0].sampling == SamplingParams(
        seed=1,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.5,
        logit_bias={5: -100.0, 7: 2.5},
        min_tokens=3,
    )


async def test_the_fingerprint_is_the_same_in_every_answer(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = reporting(tokens("yes"))
    answers = [await complete(http), await complete(http, CHAT), *await stream(http), *await stream(http, CHAT)]
    assert len({answer["system_fingerprint"] for answer in answers}) == 1


async def test_a_long_prompt_is_told_whole_and_in_order(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    prompt = [5 + place % 4000 for place in range(1500)]
    engine.script = reporting([5])
    (choice,) = (await complete(http, prompt=prompt, echo=True, logprobs=0, max_tokens=1))["choices"]
    assert choice["text"] == tokenizer.decode([*prompt, 5], from_start=True)
    assert choice["logprobs"]["token_logprobs"] == [None, *(_figure(token_id, 0) for token_id in [*prompt[1:], 5])]
