"""Requests at the server's limits: one within is served, the next is refused by name; a canary's answer stays."""

import json
from collections.abc import Iterator

import httpx
import msgspec
import pytest

from persimmon.server.http.errors import ErrorBody
from tests.end_to_end.canary import SECONDS, Canary
from tests.end_to_end.limit_case import Case
from tests.end_to_end.limits import CASES
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.path} {case.name}")
def test_a_request_at_a_limit_gets_its_status_and_others_get_their_answers(
    client: httpx.Client, canary: Canary, case: Case
) -> None:
    headers = httpx.Headers({"Content-Type": "application/json"})
    headers.update(case.headers)
    with canary.beside():
        response = client.request(case.method, case.path, content=case.content(), headers=headers)
    assert response.status_code == case.status, response.text[:1000]
    check_answer(response)
    if case.says:
        assert case.says in response.json()["error"]["message"]


def test_every_case_has_its_own_name() -> None:
    names = [(case.path, case.name) for case in CASES]
    assert sorted(names) == sorted(set(names))


def test_every_refusal_names_what_is_wrong() -> None:
    assert [case.name for case in CASES if (case.status == 200) == bool(case.says)] == []
