"""Prompts become token ids within bounds: no text and no list of texts takes memory without measure."""

import threading
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from persimmon.model.tokenizer import Tokenizer
from persimmon.server.http.errors import ApiError, bad_request
from persimmon.server.http.generation.prompt_encoder import MAX_CHARACTERS, PromptEncoder, PromptInput

pytestmark = pytest.mark.anyio

TOO_LONG = "x" * (MAX_CHARACTERS + 1)


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("POST", "/v1/completions", {"prompt": TOO_LONG}, "prompt"),
        ("POST", "/v1/completions", {"prompt": ["a", TOO_LONG]}, "prompt[1]"),
        ("POST", "/v1/completions", {"prompt": TOO_LONG, "truncate_prompt_tokens": 5}, "prompt"),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": TOO_LONG}]}, "messages"),
        ("POST", "/v1/embeddings", {"input": TOO_LONG}, "input"),
        ("POST", "/tokenize", {"prompt": TOO_LONG}, "prompt"),
        ("POST", "/tokenize", {"messages": [{"role": "user", "content": TOO_LONG}]}, "messages"),
        ("PUT", "/api", {"prompts": [TOO_LONG], "tokens_to_generate": 1}, "prompts"),
    ],
)
async def test_a_text_that_no_model_reads_is_refused_before_it_is_tokenized(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, method: str, path: str, body: dict[str, Any], param: str
) -> None:
    def encode(*arguments: object) -> list[int]:
        raise AssertionError("it is tokenized")

    monkeypatch.setattr(Tokenizer, "encode", encode)
    monkeypatch.setattr(Tokenizer, "encode_parts", encode)
    response = await http.request(method, path, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, "context_length_exceeded")
    assert f"at most {MAX_CHARACTERS:,}" in error["message"]


@pytest.mark.parametrize(("count", "in_the_loop"), [(10, True), (100_000, False)])
async def test_long_lists_of_token_ids_are_decoded_off_the_event_loop(
    tokenizer: Tokenizer, count: int, in_the_loop: bool
) -> None:
    threads = []
    token_ids = [5 + number % 4000 for number in range(count)]
    text = await PromptEncoder(tokenizer, 2048).decode(token_ids, lambda ids: threads.append(threading.get_ident()))
    assert text == tokenizer.decode(token_ids, from_start=True)
    assert [thread == threading.get_ident() for thread in threads] == [in_the_loop]


async def test_the_longest_text_is_tokenized(tokenizer: Tokenizer) -> None:
    text = "a " * (MAX_CHARACTERS // 2)
    assert await PromptEncoder(tokenizer, 2048).encode(["prompt"], [text]) == [tokenizer.encode(text)]


async def test_a_long_context_makes_room_for_longer_texts(tokenizer: Tokenizer) -> None:
    assert len((await PromptEncoder(tokenizer, 1 << 17).encode(["prompt"], [TOO_LONG]))[0]) > 1


async def test_texts_of_all_lengths_come_back_in_their_order(tokenizer: Tokenizer) -> None:
    prompts: Sequence[PromptInput] = ["a", "b " * 300_000, [5, 6], "c " * 300_000, "d", "e " * 10_000]
    names = [f"prompt[{index}]" for index in range(len(prompts))]
    ids = [prompt if isinstance(prompt, list) else tokenizer.encode(str(prompt)) for prompt in prompts]
    assert await PromptEncoder(tokenizer, 2048).encode(names, prompts) == ids


async def test_a_prompt_that_does_not_fit_ends_the_work_on_the_others(tokenizer: Tokenizer) -> None:
    seen = []

    def fit(name: str, prompt: PromptInput, token_ids: list[int]) -> list[int]:
        seen.append(name)
        if len(token_ids) > 100:
            raise bad_request("too long", name)
        return token_ids[:2]

    encoder = PromptEncoder(tokenizer, 2048)
    short = await encoder.encode(["a", "b"], [[5, 6, 7], "some words"], fit=fit)
    assert short == [[5, 6], tokenizer.encode("some words")[:2]]
    seen.clear()
    with pytest.raises(ApiError) as error:
        await encoder.encode(["a", "b", "c"], ["x", "y " * 20_000, "z " * 20_000], fit=fit)
    assert error.value.body.error.param == "b"
    assert seen == ["a", "b"]
