"""--speculative-config as a client sees it: the same answers as without guesses, from a real server."""

import json

import httpx

from tests.end_to_end.serving import serving

CONFIG = json.dumps({"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_max": 3, "prompt_lookup_min": 1})
CHAT = "human: What does galaxy mean?\n\nadept: a galaxy is a galaxy of galaxies of a galaxy of galaxies"
SCHEMA = {
    "type": "array",
    "items": {"type": "object", "properties": {"fruit": {"enum": ["plum", "fig"]}}, "required": ["fruit"]},
    "minItems": 2,
    "maxItems": 4,
}

BODIES = [
    {"prompt": CHAT, "temperature": 0, "max_tokens": 60, "ignore_eos": True, "logprobs": 2},
    {"prompt": CHAT, "temperature": 1, "max_tokens": 40, "n": 3, "seed": 1, "stop": [" of", "\n"]},
    {"prompt": CHAT, "temperature": 0.7, "max_tokens": 80, "seed": 2, "ignore_eos": True, "frequency_penalty": 0.1},
    {
        "prompt": CHAT,
        "temperature": 1,
        "max_tokens": 80,
        "seed": 3,
        "logprobs": 1,
        "response_format": {"type": "json_schema", "json_schema": {"name": "fruit", "schema": SCHEMA}},
    },
]


def streamed(client: httpx.Client, body: dict[str, object]) -> list[str]:
    """The text of each choice, from the events of a stream."""
    texts = [""] * int(str(body.get("n", 1)))
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    texts[choice["index"]] += choice["text"]
    return texts


def test_a_client_gets_the_same_answers_with_and_without_guesses() -> None:
    arguments = ("--speculative-config", CONFIG, "--no-enable-prefix-caching")
    with serving(*arguments) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        for body in BODIES:
            plain = client.post("/v1/completions", json=body | {"speculate": False}).raise_for_status().json()
            guessed = client.post("/v1/completions", json=body).raise_for_status().json()
            assert (guessed["choices"], guessed["usage"]) == (plain["choices"], plain["usage"])
            assert streamed(client, body) == [choice["text"] for choice in plain["choices"]]
        metrics = server.wait_until_idle()
    accepted, drafted = (metrics[f"persimmon_spec_decode_{kind}_tokens_total"] for kind in ("accepted", "draft"))
    assert drafted > accepted > 50
