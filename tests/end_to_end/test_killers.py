"""A server that survives what killed others, and does its neighbours' work right meanwhile."""

import json
from collections.abc import Iterator

import httpx
import msgspec
import pytest

from persimmon.server.http.errors import ErrorBody
from tests.end_to_end.canary import SECONDS, Canary
from tests.end_to_end.killers import KILLERS, Killer
from tests.end_to_end.serving import Server


@pytest.fixture(scope="module")
def canary(demo: Server) -> Iterator[Canary]:
    canary = Canary(demo)
    yield canary
    canary.check()
    canary.close()


@pytest.fixture(scope="module")
def client(demo: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=demo.url, timeout=SECONDS) as client:
        yield client


def check_answer(response: httpx.Response) -> None:
    if response.headers["content-type"].startswith("text/event-stream"):
        events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        assert all(json.loads(each)["object"].endswith(("completion", "chunk")) for each in events[:-1])
        return
    assert response.headers["content-type"] == "application/json"
    if response.status_code == 200:
        assert response.json()
        return
    error = msgspec.json.decode(response.content, type=ErrorBody).error
    assert error.type == "invalid_request_error"
    assert error.message.endswith(".")
    assert len(error.message) < 2000


@pytest.mark.parametrize("killer", KILLERS, ids=lambda killer: f"{killer.path} {killer.name} {killer.source}".strip())
def test_a_request_that_killed_others_is_answered_and_harms_nobody(
    client: httpx.Client, canary: Canary, killer: Killer
) -> None:
    headers = {"Content-Type": "application/json", **killer.headers}
    with canary.beside():
        response = client.request(killer.method, killer.path, content=killer.content(), headers=headers)
    assert response.status_code in killer.statuses, response.text[:1000]
    check_answer(response)


def test_every_killer_has_a_name_of_its_own() -> None:
    names = [(killer.path, killer.name) for killer in KILLERS]
    assert sorted(names) == sorted(set(names))
