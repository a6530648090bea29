"""The comparison of two servers' answers, on servers that only pretend."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from benchmarks.same_answers import PROMPTS, SETTINGS, compare


def server(text: Callable[[dict[str, Any]], str]) -> httpx.Client:
    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        return httpx.Response(200, json={"choices": [{"text": text(body), "finish_reason": "stop"}]})

    return httpx.Client(transport=httpx.MockTransport(answer), base_url="http://server")


def test_every_setting_is_sent_with_every_prompt_and_answers_are_compared() -> None:
    def other(body: dict[str, Any]) -> str:
        return "other" if "logit_bias" in body and body["prompt"] == PROMPTS[0] else "same"

    found = compare((server(lambda body: "same"), server(other)), ("one", "two"))
    assert [(each.setting, each.prompt) for each in found] == [(own, prompt) for own in SETTINGS for prompt in PROMPTS]
    different = {each.setting for each in found if not each.same}
    assert different == {name for name, fields in SETTINGS.items() if "logit_bias" in fields}


def test_a_refusal_is_an_error_that_says_which_server_and_why() -> None:
    refusing = httpx.MockTransport(lambda request: httpx.Response(400, text="no such field"))
    client = httpx.Client(transport=refusing, base_url="http://strict")
    with pytest.raises(httpx.HTTPStatusError, match=r"http://strict refused .*no such field"):
        compare((client, client), ("one", "two"))
