"""Whether two servers give the same greedy answers to requests that change logits: penalties, biases, bans.

    python -m benchmarks.same_answers http://127.0.0.1:8000 http://127.0.0.1:8101 --out FILE.json

The first is this server, the second another one, like vLLM, with the same checkpoint; both must be running.  Greedy
answers are compared, so settings that only matter to a draw must change nothing.  Prints a line for each request whose
answers differ and exits with 1 if there is any.  Two tokens that nearly tie may part answers in float32 too.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

PROMPTS = (
    "human: What does galaxy mean?\n\nadept:",
    "human: Who are you?\n\nadept:",
    "human: Give me a synonym of big.\n\nadept:",
    "The word river is a noun. The word river",
)
TOKENS = 48

# Ids of frequent words of the demo's vocabulary, so that biases meet tokens of prompts and answers.
_BIASES = {str(token): bias for token, bias in zip(range(259, 459, 4), [4.0, -4.0, 8.0, -8.0, 1.5] * 10, strict=True)}

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "nothing": {},
    "repetition_penalty 1.3": {"repetition_penalty": 1.3},
    "repetition_penalty 0.8": {"repetition_penalty": 0.8},
    "frequency_penalty 0.7": {"frequency_penalty": 0.7},
    "presence_penalty 1.5": {"presence_penalty": 1.5},
    "negative penalties": {"frequency_penalty": -0.5, "presence_penalty": -1.0},
    "all penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": 0.6},
    "biases": {"logit_bias": _BIASES},
    "biases and repetition_penalty": {"logit_bias": _BIASES, "repetition_penalty": 1.5},
    "biases and repetition_penalty below 1": {"logit_bias": _BIASES, "repetition_penalty": 0.7},
    "biases and all penalties": {
        "logit_bias": _BIASES,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.6,
    },
    "min_tokens": {"min_tokens": 40},
    "min_tokens and a bias towards the end": {"min_tokens": 30, "logit_bias": {"1": 100}},
    "settings of draws": {"top_k": 3, "top_p": 0.5, "min_p": 0.3, "seed": 7},
    "penalties and settings of draws": {"repetition_penalty": 1.3, "top_k": 3, "top_p": 0.5, "min_p": 0.3},
}


@dataclass(frozen=True)
class Comparison:
    """One request's answers.

    Attributes:
        setting: its name among `SETTINGS`.
        prompt: what was continued.
        answers: text and finish reason, of each server.
    """

    setting: str
    prompt: str
    answers: tuple[tuple[str, str], tuple[str, str]]

    @property
    def same(self) -> bool:
        """Whether both servers answered alike."""
        return self.answers[0] == self.answers[1]


def compare(clients: tuple[httpx.Client, httpx.Client], models: tuple[str, str]) -> list[Comparison]:
    """Sends every setting with every prompt to both servers."""
    comparisons = []
    for setting, fields in SETTINGS.items():
        for prompt in PROMPTS:
            first, second = (
                _answer(client, {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, **fields})
                for client, model in zip(clients, models, strict=True)
            )
            comparisons.append(Comparison(setting, prompt, (first, second)))
    return comparisons


def _answer(client: httpx.Client, body: Mapping[str, Any]) -> tuple[str, str]:
    response = client.post("/v1/completions", json=body)
    if response.is_error:
        raise httpx.HTTPStatusError(
            f"{client.base_url} refused {body}: {response.text[:500]}", request=response.request, response=response
        )
    choice = response.json()["choices"][0]
    return choice["text"], choice["finish_reason"]


def _model(client: httpx.Client) -> str:
    return str(client.get("/v1/models").raise_for_status().json()["data"][0]["id"])


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.same_answers", description="Compare two servers' greedy answers."
    )
    parser.add_argument("first", help="base URL of this server")
    parser.add_argument("second", help="base URL of the other one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every answer as JSON")
    arguments = parser.parse_args()
    with (
        httpx.Client(base_url=arguments.first, timeout=120) as first,
        httpx.Client(base_url=arguments.second, timeout=120) as second,
    ):
        try:
            comparisons = compare((first, second), (_model(first), _model(second)))
        except httpx.HTTPError as error:
            print(error, file=sys.stderr)
            return 2
    different = [each for each in comparisons if not each.same]
    for each in different:
        print(f"{each.setting}, {each.prompt!r}:")
        for text, reason in each.answers:
            print(f"    {reason}: {text!r}")
    print(f"{len(comparisons) - len(different)} of {len(comparisons)} answers are the same")
    if arguments.out:
        arguments.out.write_text(json.dumps([asdict(each) for each in comparisons], indent=2) + "\n")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
