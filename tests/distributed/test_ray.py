"""The server on a real Ray cluster: the whole API through Ray's proxy, and what happens when parts of it end."""

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray

from persimmon.server.ray.application import InvalidArgumentsError, app
from persimmon.server.ray.autoscaling import wanted_replicas
from tests.distributed.ray_cluster import Cluster, client, cluster, has_ended, spawned, until
from tests.end_to_end.test_disconnects import leave

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
ARGUMENTS = {"kv_cache_memory": "128MB", "max_num_seqs": 32, "speculative_config": "off"}
WORDS = ["galaxy", "river", "tree", "house", "music", "bread", "winter", "paper", "horse", "garden", "silver", "window"]
TWO_RANKS = ARGUMENTS | {"num_replicas": 1, "tensor_parallel_size": 2, "num_cpus": 2}
AUTOSCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "target_ongoing_requests": 4,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2,
    "upscale_delay_s": 0,
    "downscale_delay_s": 1,
    "policy": {"policy_function": f"{wanted_replicas.__module__}:{wanted_replicas.__name__}"},
}
"""In place of what the application says; Ray's own delays are minutes."""

STREAMED = 500
"""Tokens of an answer that is long enough for something to be killed before its end."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def shared() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERSIMMON_STEP_TIMEOUT", "10")
        with cluster(**ARGUMENTS) as own:
            yield own


@pytest.fixture
def two_replicas(shared: Cluster) -> Cluster:
    shared.deploy(ARGUMENTS)
    shared.wait_for_replicas(2)
    return shared


def openai_client(cluster: Cluster) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=90)


async def answer(http: httpx.AsyncClient, prompt: str, **fields: Any) -> str:
    body = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True} | fields
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


async def test_the_openai_client_streams_through_the_proxy(two_replicas: Cluster):
    messages: Any = [{"role": "user", "content": "What does galaxy mean?"}]
    fields: Any = {"model": "persimmon-demo", "messages": messages, "temperature": 0}
    async with openai_client(two_replicas) as own:
        whole = await own.chat.completions.create(**fields)
        stream = await own.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
        *chunks, usage = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert usage.usage == whole.usage
    assert len(chunks) > 2


async def test_200_requests_at_once_get_their_own_answers(two_replicas: Cluster):
    prompts = [
        f"human: What does {WORDS[number % len(WORDS)]} number {number} mean?\n\nadept:" for number in range(200)
    ]
    few = asyncio.Semaphore(4)
    async with client(two_replicas) as http:

        async def alone(prompt: str) -> str:
            async with few:
                return await answer(http, prompt)

        expected = await asyncio.gather(*map(alone, prompts))
        assert await asyncio.gather(*(answer(http, prompt) for prompt in prompts)) == expected
    assert len(set(expected)) > 100


async def test_a_conversation_goes_on_where_its_beginning_is_cached(two_replicas: Cluster):
    async def converse(chat: Any, word: str) -> list[int]:
        messages: Any = []
        cached = []
        for question in ("mean", "mean to you", "really mean", "not mean"):
            messages.append({"role": "user", "content": f"What does {word} {question}? " + f"Say {word}. " * 8})
            reply = await chat.create(model="persimmon-demo", messages=messages, temperature=0, max_tokens=8)
            messages.append({"role": "assistant", "content": reply.choices[0].message.content})
            cached.append(reply.usage.prompt_tokens_details.cached_tokens or 0)
        return cached

    async with openai_client(two_replicas) as own:
        turns = [await converse(own.chat.completions, word) for word in WORDS]
    for first, *others in turns:
        assert first < min(others)
        assert others == sorted(others)
    known = two_replicas.known_prefixes()
    assert len(known) == 2
    assert all(known)  # not all at one replica


async def test_an_answer_of_several_megabytes_passes_the_proxy(two_replicas: Cluster):
    texts = [f"{word} {number}" for word in WORDS for number in range(150)]
    async with client(two_replicas) as http:
        response = await http.post("/v1/embeddings", json={"model": "persimmon-demo", "input": texts})
    assert response.status_code == 200
    assert len(response.content) > 4 << 20
    assert [item["index"] for item in response.json()["data"]] == list(range(len(texts)))


async def stream_tokens(cluster: Cluster, prompt: str, begun: asyncio.Semaphore) -> int:
    """The tokens of an answer that has been streamed to its end; `begun` is released when it begins."""
    async with openai_client(cluster) as own:
        stream = await own.completions.create(
            model="persimmon-demo",
            prompt=prompt,
            max_tokens=STREAMED,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        chunks = aiter(stream)
        await anext(chunks)
        begun.release()
        *_, last = [chunk async for chunk in chunks]
    assert last.usage is not None
    return last.usage.completion_tokens


@pytest.mark.parametrize(
    ("part", "number"),
    [("replica", signal.SIGKILL), ("engine", signal.SIGKILL), ("engine", signal.SIGSTOP)],
    ids=["killed replica", "killed engine", "hung engine"],
)
async def test_what_dies_or_hangs_ends_its_own_streams_with_an_error_and_is_replaced(
    two_replicas: Cluster, part: str, number: signal.Signals
):
    engines = two_replicas.engines()
    assert len(engines) == 2
    victim = engines[0].parent() if part == "replica" else engines[0]
    assert victim is not None
    prompts = [f"human: {word}?\n\nadept:" for word in WORDS[:8]]
    begun = asyncio.Semaphore(0)
    streams = [asyncio.create_task(stream_tokens(two_replicas, prompt, begun)) for prompt in prompts]
    for _ in streams:
        await begun.acquire()
    victim.send_signal(number)
    ended = await asyncio.gather(*streams, return_exceptions=True)
    broken = [each for each in ended if isinstance(each, BaseException)]
    assert 0 < len(broken) < len(ended)
    for error in broken:
        assert isinstance(error, openai.APIError)
        assert error.code == ("replica_dead" if part == "replica" else "engine_dead")
    assert {each for each in ended if isinstance(each, int)} == {STREAMED}
    await asyncio.to_thread(two_replicas.wait_for_replicas, 2, engines[0])
    assert has_ended(engines[0])
    assert await stream_tokens(two_replicas, "human: galaxy?\n\nadept:", begun) == STREAMED


async def test_ray_exports_the_servers_metrics(two_replicas: Cluster):
    def exported() -> bool:
        text = httpx.get(f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics", timeout=30).text
        usage = re.findall(r"^ray_persimmon_kv_cache_usage_ratio\{.*replica=\"(\w+)\"", text, re.MULTILINE)
        generated = re.findall(r"^ray_persimmon_generated_tokens_total\{.* (\d+\.\d+)$", text, re.MULTILINE)
        return len(set(usage)) >= 2 and sum(map(float, generated)) > 0

    await asyncio.to_thread(until, exported)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_a_client_that_leaves_frees_its_blocks(two_replicas: Cluster, stream: bool):
    async with client(two_replicas) as http:
        body = {"prompt": "human: Hi\n\nadept:", "max_tokens": 1500, "ignore_eos": True, "stream": stream, "n": 4}
        asking = asyncio.create_task(http.post("/v1/completions", json=body))
        while not (await asyncio.to_thread(two_replicas.gauges))["requests_running"]:
            assert not asking.done()
        asking.cancel()
        await asyncio.wait((asking,))
    await asyncio.to_thread(two_replicas.wait_until_idle)


async def test_300_clients_that_vanish_leave_nothing(two_replicas: Cluster):
    places = asyncio.Semaphore(50)
    url = httpx.URL(two_replicas.url)

    async def leaver(number: int) -> None:
        async with places:
            await leave(url, random.Random(number))

    async with asyncio.TaskGroup() as tasks:
        for number in range(300):
            tasks.create_task(leaver(number))
    await asyncio.to_thread(two_replicas.wait_until_idle)
    async with client(two_replicas) as http:
        assert await answer(http, "human: What does galaxy mean?\n\nadept:")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each rank needs a core")
async def test_a_replica_of_two_ranks_answers_as_one_rank_does_and_is_replaced_when_a_rank_dies(two_replicas: Cluster):
    async with client(two_replicas) as http:
        expected = [await answer(http, word) for word in WORDS]
        await asyncio.to_thread(two_replicas.deploy, TWO_RANKS)
        await asyncio.to_thread(two_replicas.wait_for_replicas, 1)
        assert [await answer(http, word) for word in WORDS] == expected
        (engine,) = two_replicas.engines()
        (rank,) = spawned(engine)
        begun = asyncio.Semaphore(0)
        stream = asyncio.create_task(stream_tokens(two_replicas, "human: galaxy?\n\nadept:", begun))
        await begun.acquire()
        rank.kill()
        with pytest.raises(openai.APIError) as caught:
            await stream
        assert caught.value.code == "engine_dead"
        await asyncio.to_thread(two_replicas.wait_for_replicas, 1, engine)
        assert has_ended(engine)
        assert [await answer(http, word) for word in WORDS] == expected


async def test_autoscaling_from_1_to_2_and_back_loses_no_request(shared: Cluster):
    await asyncio.to_thread(shared.deploy, ARGUMENTS, autoscaling_config=AUTOSCALING)
    await asyncio.to_thread(shared.wait_for_replicas, 1)
    engines = [set(shared.engines())]
    stopped = {word: asyncio.Event() for word in WORDS}
    async with client(shared) as http:
        expected = {word: await answer(http, word, max_tokens=60) for word in WORDS}

        async def keep_asking(word: str) -> int:
            number = 0
            while not stopped[word].is_set():
                assert await answer(http, word, max_tokens=60) == expected[word]
                number += 1
            return number

        async with asyncio.TaskGroup() as tasks:
            asking = [tasks.create_task(keep_asking(word)) for word in WORDS]
            await asyncio.to_thread(shared.wait_for_replicas, 2)
            engines.append(set(shared.engines()))
            for word in WORDS[1:]:
                stopped[word].set()
            await asyncio.to_thread(shared.wait_for_replicas, 1)
            engines.append(set(shared.engines()))
            stopped[WORDS[0]].set()
    assert all(task.result() for task in asking)
    assert engines[0] < engines[1] > engines[2]  # scaling restarts no replica that stays


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 17}, "--block-size"),
        ({"num_replicas": 0}, "num_replicas is 0: input should be greater than or equal to 1"),
        ({"num_replicas": 3, "max_replicas": 2}, "max_replicas is 2; expected num_replicas or more, 3"),
        ({"num_gpus": 1, "tensor_parallel_size": 2}, "num_gpus is 1, but tensor_parallel_size is 2: "),
        ({"replicas": 2}, "replicas is not an argument of the application; expected one of num_replicas, "),
    ],
)
def test_bad_arguments_are_explained(arguments: dict[str, Any], message: str):
    with pytest.raises(InvalidArgumentsError, match=re.escape(message)):
        app(arguments)


def test_serve_run_explains_bad_arguments_in_one_line_before_anything_starts():
    command = [str(Path(sys.executable).with_name("serve")), "run", "deploy.ray:app", f"model={ROOT / 'docs'}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    (line,) = [line for line in ended.stderr.splitlines() if not line.startswith(("20", "\x1b"))]
    assert line.startswith("persimmon: error: ")
    assert "config.json" in line
    assert ended.returncode == 2
