"""The comparison of two servers' answers, on servers that only pretend."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.same_answers import PROMPTS, SETTINGS, Server, compare
from persimmon.server.bench.answer import RequestFailedError
from persimmon.server.bench.http_client import Response


def server(text: Callable[[dict[str, Any]], str]) -> Server:
    async def post(path: str, body: bytes) -> Response:
        choice = {"text": text(json.loads(body)), "finish_reason": "stop"}
        return Response(0.0, status=200, pieces=[(0.0, json.dumps({"choices": [choice]}).encode())])

    return Server("http://server", "model", post)


def test_every_setting_is_sent_with_every_prompt_and_answers_are_compared() -> None:
    def other(body: dict[str, Any]) -> str:
        return "other" if "logit_bias" in body and body["prompt"] == PROMPTS[0] else "same"

    found = asyncio.run(compare(server(lambda body: "same"), server(other)))
    assert [(each.setting, each.prompt) for each in found] == [(own, prompt) for own in SETTINGS for prompt in PROMPTS]
    different = {each.setting for each in found if not each.same}
    assert different == {name for name, fields in SETTINGS.items() if "logit_bias" in fields}


def test_a_refusal_is_an_error_that_says_which_server_and_why() -> None:
    async def refuse(path: str, body: bytes) -> Response:
        return Response(0.0, status=400, pieces=[(0.0, b'{"error": {"message": "no such field"}}')])

    strict = Server("http://strict", "model", refuse)
    with pytest.raises(RequestFailedError, match=r"http://strict refused .*no such field"):
        asyncio.run(compare(strict, strict))
