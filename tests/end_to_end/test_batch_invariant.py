"""--batch-invariant as a client sees it: a real server gives a request the same bits whatever else it computes."""

import asyncio

import httpx
import pytest

from tests.end_to_end.serving import Server, serving

WORDS = ("galaxy", "volcano", "penguin", "guitar", "rainbow", "bicycle", "river", "garden")
BEGINNING = "The robot walked slowly through the old garden and told the computer what it had seen there. "
OTHERS = 24


def request(index: int) -> dict[str, object]:
    """Greedy and drawn ones, with and without a beginning that others share."""
    word = WORDS[index % len(WORDS)]
    return {
        "prompt": f"{BEGINNING * (index % 3)}human: What does {word} mean?\n\nadept:",
        "max_tokens": 24,
        "temperature": 0.0 if index % 2 else 1.0,
        "seed": index,
        "logprobs": 3,
        "ignore_eos": True,
    }


async def answers(server: Server, requests: list[dict[str, object]]) -> list[dict[str, object]]:
    """All at once; what each choice says, log-probabilities included."""
    limits = httpx.Limits(max_connections=len(requests))
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        responses = await asyncio.gather(
            *(client.post("/v1/completions", json={"model": server.name} | body) for body in requests)
        )
    return [response.raise_for_status().json()["choices"][0] for response in responses]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_request_has_the_same_bits_alone_cached_and_among_others(dtype: str) -> None:
    own = [request(index) for index in range(6)]
    others = [request(index) | {"max_tokens": 120, "logprobs": 5} for index in range(6, 6 + OTHERS)]
    arguments = ("--batch-invariant", "--dtype", dtype, "--max-num-batched-tokens", "40", "--max-model-len", "256")
    # Too small a cache for all of them: sequences are preempted and computed again.
    with serving(*arguments, "--kv-cache-memory", "6MB") as server:
        alone = [asyncio.run(answers(server, [body]))[0] for body in own]
        cached = [asyncio.run(answers(server, [body]))[0] for body in own]
        among = asyncio.run(answers(server, [*others, *own]))[OTHERS:]
        metrics = server.metrics()
    assert cached == alone
    assert among == alone
    assert metrics["persimmon_prefix_cache_hit_tokens_total"] > 0
    assert metrics["persimmon_preemptions_total"] > 0
