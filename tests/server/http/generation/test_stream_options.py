"""What streams may be asked for, and the order of what they hold."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import openai
import pytest

from persimmon.server.engine.messages import SequenceOutput
from tests.server.http.conftest import LiveServer
from tests.server.http.fake_engine import FakeEngine, Sample, says

pytestmark = pytest.mark.anyio

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Hello"},
    CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
}
EOS = 1
Tokens = Callable[[str], list[int]]


async def chunks(http: httpx.AsyncClient, path: str, **body: object) -> list[dict[str, Any]]:
    response = await http.post(path, json=BODIES[path] | body | {"stream": True})
    assert response.status_code == 200, response.text
    *events, done = response.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("last", [False, True])
async def test_each_chunk_has_the_usage_so_far_when_asked_for(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens, path: str, last: bool
) -> None:
    engine.script = says(tokens("a sweet fruit"), EOS)
    asked = await chunks(
        http, path, max_tokens=50, stream_options={"continuous_usage_stats": True, "include_usage": last}
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in asked]
    prompt_tokens = len(engine.submitted[0].token_ids)
    assert all(chunk["usage"]["prompt_tokens"] == prompt_tokens for chunk in asked)
    assert counts == sorted(counts)
    assert counts[-1] == len(tokens("a sweet fruit")) + 1
    assert (asked[-1]["choices"] == []) == last


def later_samples_first(waiting: list[Sample], said: Sequence[int]) -> Callable[[Sample], list[SequenceOutput]]:
    """A script for three samples: the last one speaks first."""

    def script(sample: Sample) -> list[SequenceOutput]:
        waiting.append(sample)
        if len(waiting) < 3:
            return []
        return [SequenceOutput(each.sequence_id, list(said), "stop") for each in reversed(waiting)]

    return script


async def test_the_roles_of_all_choices_come_first_and_in_order(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = later_samples_first([], [*tokens("yes"), EOS])
    choices = [chunk["choices"][0] for chunk in await chunks(http, CHAT, n=3)]
    assert [(choice["index"], choice["delta"].get("role")) for choice in choices[:3]] == [
        (0, "assistant"),
        (1, "assistant"),
        (2, "assistant"),
    ]
    assert all("role" not in choice["delta"] for choice in choices[3:])


async def test_openais_client_gathers_several_answers_whichever_is_first(
    server: LiveServer, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = later_samples_first([], [*tokens("yes"), EOS])
    async with (
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        client.chat.completions.stream(model="demo", messages=[{"role": "user", "content": "Hi"}], n=3) as stream,
    ):
        final = await stream.get_final_completion()
    assert [(choice.index, choice.message.content) for choice in final.choices] == [(0, "yes"), (1, "yes"), (2, "yes")]
