"""Whether two servers give the same greedy answers to requests that change logits: penalties, biases, bans.

    python -m benchmarks.same_answers http://127.0.0.1:8000 http://127.0.0.1:8101 --out FILE.json

The first is this server, the second another one, like vLLM, with the same checkpoint; both must be running.  Greedy
answers are compared, so settings that only matter to a draw must change nothing.  Prints a line for each request whose
answers differ and exits with 1 if there is any.  Two tokens that nearly tie may part answers in float32 too.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import write_figures
from persimmon.server.bench.answer import RequestFailedError, error_message
from persimmon.server.bench.http_client import Connection, Endpoint, Response
from persimmon.server.bench.probe import served_model
from persimmon.server.bench.workload import COMPLETIONS

PROMPTS = (
    "human: What does galaxy mean?\n\nadept:",
    "human: Who are you?\n\nadept:",
    "human: Give me a synonym of big.\n\nadept:",
    "The word river is a noun. The word river",
)
TOKENS = 48
ANSWER_SECONDS = 120

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


@dataclass(frozen=True)
class Server:
    """One of the two.

    Attributes:
        url: for messages.
        model: its name there.
        post: sends a JSON body to a path.
    """

    url: str
    model: str
    post: Callable[[str, bytes], Awaitable[Response]]

    async def answer(self, fields: Mapping[str, Any]) -> tuple[str, str]:
        """Text and finish reason of a greedy answer.

        Raises:
            OSError: no answer.
            RequestFailedError: a refusal.
        """
        body = {"model": self.model, "max_tokens": TOKENS, "temperature": 0, **fields}
        async with asyncio.timeout(ANSWER_SECONDS):
            response = await self.post(COMPLETIONS, json.dumps(body).encode())
        if response.status != 200:
            raise RequestFailedError(f"{self.url} refused {body}", error_message(response.body))
        choice = json.loads(response.body)["choices"][0]
        return choice["text"], choice["finish_reason"]


async def compare(first: Server, second: Server) -> list[Comparison]:
    """Sends every setting with every prompt to both servers.

    Raises:
        OSError: no answer.
        RequestFailedError: a refusal.
    """
    return [
        Comparison(setting, prompt, (await first.answer(body), await second.answer(body)))
        for setting, fields in SETTINGS.items()
        for prompt in PROMPTS
        for body in ({"prompt": prompt, **fields},)
    ]


async def _compare(*urls: str) -> list[Comparison]:
    ends = [Endpoint.from_url(url) for url in urls]
    async with Connection(ends[0]) as one, Connection(ends[1]) as other:
        first, second = [
            Server(end.url, await served_model(end), connection.post)
            for end, connection in zip(ends, (one, other), strict=True)
        ]
        return await compare(first, second)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.same_answers", description="Compare two servers' greedy answers."
    )
    parser.add_argument("first", help="base URL of this server")
    parser.add_argument("second", help="base URL of the other one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every answer as JSON")
    arguments = parser.parse_args()
    try:
        comparisons = asyncio.run(_compare(arguments.first, arguments.second))
    except (OSError, ValueError, RequestFailedError) as error:
        print(error or "no answer in time", file=sys.stderr)
        return 2
    different = [each for each in comparisons if not each.same]
    for each in different:
        print(f"{each.setting}, {each.prompt!r}:")
        for text, reason in each.answers:
            print(f"    {reason}: {text!r}")
    print(f"{len(comparisons) - len(different)} of {len(comparisons)} answers are the same")
    write_figures(arguments.out, {"comparisons": [asdict(each) for each in comparisons]})
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
