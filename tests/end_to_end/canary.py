"""Requests whose answers must stay the same, token for token, whatever else a server is asked meanwhile."""

import contextlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.end_to_end.serving import Server

PROMPT = "human: What does galaxy mean?\n\nadept:"
GREEDY = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "return_token_ids": True, "logprobs": 5}
SEEDED = GREEDY | {"temperature": 1.4, "seed": 20}
SECONDS = 120.0

LOGPROB_ERROR = 1e-4
"""Tokens are the same to the last bit; sums in other batches are not on every CPU."""


class Canary:
    """A greedy and a seeded request, asked again and again.

    Args:
        server: it must be well now; its processes must be the same ones later.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._processes = server.children()
        self._client = httpx.Client(base_url=server.url, timeout=SECONDS)
        self._thread = ThreadPoolExecutor(1)
        self._answers = self._ask()
        self._turns = itertools.cycle(zip((GREEDY, SEEDED), self._answers, strict=True))

    def close(self) -> None:
        """Ends its connections."""
        self._thread.shutdown()
        self._client.close()

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Asks while the block runs, so that both share the engine's steps, and compares; greedy and seeded in turn."""
        body, answer = next(self._turns)
        asked = self._thread.submit(self._answer, body)
        yield
        _compare(asked.result(), answer)

    def check(self) -> None:
        """The answers and the processes are those of the beginning."""
        for asked, answer in zip(self._ask(), self._answers, strict=True):
            _compare(asked, answer)
        assert self._server.children() == self._processes

    def _ask(self) -> list[dict[str, Any]]:
        return [self._answer(body) for body in (GREEDY, SEEDED)]

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        response = self._client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        return choice


def _compare(answer: dict[str, Any], expected: dict[str, Any]) -> None:
    reported, wanted = answer["logprobs"], expected["logprobs"]
    assert reported["token_logprobs"] == pytest.approx(wanted["token_logprobs"], abs=LOGPROB_ERROR)
    assert answer | {"logprobs": reported["tokens"]} == expected | {"logprobs": wanted["tokens"]}
