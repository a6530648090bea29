"""The table of endpoints: with a row, its handler and its schemas an endpoint has all that the others have."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, ClassVar

import httpx
import pytest
from msgspec import Struct

from persimmon.model.config import PersimmonConfig
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.client import EngineClient
from persimmon.server.http.app import create_app
from persimmon.server.http.endpoints.endpoint import Call, Endpoint
from persimmon.server.http.endpoints.field_table import field_table
from persimmon.server.http.endpoints.model_use import USES
from persimmon.server.http.endpoints.service import Service
from persimmon.server.http.endpoints.table import ENDPOINTS, addresses, batch_urls
from persimmon.server.http.middleware import observer
from persimmon.server.http.middleware.access import Access
from persimmon.server.http.middleware.gate import Gate, Limits
from persimmon.server.http.middleware.keys import ApiKey, KeyRing
from persimmon.server.http.schemas.request_object import RequestObject, WithoutEffect
from persimmon.server.http.transport.json_response import JsonResponse
from persimmon.server.offline import batch_lines

pytestmark = pytest.mark.anyio

ACCESS = Access(KeyRing((ApiKey.of("alice", "correct-horse"),)))
ALICE = {"Authorization": "Bearer correct-horse"}
TEXT = {"text": "A persimmon"}


class EchoRequest(RequestObject):
    """What is to be repeated."""

    text: str
    without_effect: ClassVar[WithoutEffect] = {"volume": "it is a text"}


class Echo(Struct, frozen=True):
    """What was repeated, and for whom."""

    text: str
    key: str | None


async def echo(service: Service, call: Call[EchoRequest]) -> JsonResponse[Echo]:
    """Repeats a text.

    It says nothing else.
    """
    return JsonResponse(Echo(call.request.text, call.record.key))


async def reported(service: Service, call: Call[None]) -> JsonResponse[Echo]:
    """Repeats a word of the path."""
    return JsonResponse(Echo(call.path_params["word"], None), 203)


async def probed(service: Service, call: Call[None]) -> JsonResponse[Echo]:
    """Always the same."""
    return JsonResponse(Echo("well", None))


ECHO = Endpoint(
    method="POST",
    path="/v1/echo",
    request=EchoRequest,
    handler=echo,
    uses_engine=True,
    generates=True,
    in_batch_files=True,
)
PLAIN_ECHO = replace(ECHO, path="/v1/plain-echo", uses_engine=False, generates=False, in_batch_files=False)
TOLD = Endpoint(method="GET", path="/reported/{word}", request=None, handler=reported, statuses=(203,))
PROBE = Endpoint(method="GET", path="/probe", request=None, handler=probed, open_without_key=True, polled=True)
ROWS: tuple[Endpoint[Any], ...] = (*ENDPOINTS, ECHO, PLAIN_ECHO, TOLD, PROBE)


@contextlib.asynccontextmanager
async def client(
    engine_client: EngineClient, tokenizer: Tokenizer, config: PersimmonConfig, **options: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app with these rows."""
    app = create_app(engine_client, tokenizer, config, "demo", endpoints=ROWS, **options)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
        yield http


@pytest.fixture
async def http(
    engine_client: EngineClient, tokenizer: Tokenizer, config: PersimmonConfig
) -> AsyncIterator[httpx.AsyncClient]:
    async with client(engine_client, tokenizer, config) as http:
        yield http


async def test_an_endpoint_is_served_at_its_addresses_and_reads_its_body_strictly(http: httpx.AsyncClient) -> None:
    for address in ("/v1/echo", "/echo", "/v1/echo/"):
        response = await http.post(address, json=TEXT)
        assert (response.status_code, response.json()) == (200, {"text": "A persimmon", "key": None})
    for body, param in (({}, "text"), ({"text": 1}, "text"), (TEXT | {"loud": True}, "loud")):
        response = await http.post("/v1/echo", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert (await http.get("/reported/twice")).json()["text"] == "twice"
    assert (await http.get("/v1/echo")).headers["allow"] == "POST"
    assert "Did you mean /v1/echo?" in (await http.post("/v1/ecco", json=TEXT)).json()["error"]["message"]


async def test_it_is_documented_by_its_declared_types(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    operation = document["paths"]["/v1/echo"]["post"]
    assert operation["description"] == "Repeats a text."
    body, answer = "#/components/schemas/request.EchoRequest", "#/components/schemas/answer.Echo"
    assert operation["requestBody"]["content"]["application/json"]["schema"] == {"$ref": body}
    assert operation["responses"]["200"]["content"]["application/json"]["schema"] == {"$ref": answer}
    assert {"400", "401", "429", "503"} <= operation["responses"].keys()
    assert {"request.EchoRequest", "answer.Echo"} <= document["components"]["schemas"].keys()
    reported, probe = document["paths"]["/reported/{word}"]["get"], document["paths"]["/probe"]["get"]
    assert [(each["name"], each["in"]) for each in reported["parameters"]] == [("word", "path")]
    assert reported["responses"].keys() == {"203", "401", "404"}
    assert probe["responses"].keys() == {"200"}
    assert "| `volume` | `/v1/echo`, `/v1/plain-echo` | it is a text |" in field_table(ROWS)


async def test_it_needs_a_key_unless_its_row_says_otherwise(
    engine_client: EngineClient, tokenizer: Tokenizer, config: PersimmonConfig
) -> None:
    async with client(engine_client, tokenizer, config, access=ACCESS) as http:
        assert (await http.post("/v1/echo", json=TEXT)).status_code == 401
        assert (await http.get("/reported/twice")).status_code == 401
        assert (await http.get("/probe")).status_code == 200
        assert (await http.post("/v1/echo", json=TEXT, headers=ALICE)).json()["key"] == "alice"


async def test_a_full_server_refuses_it_where_its_row_says_that_it_uses_the_engine(
    engine_client: EngineClient, tokenizer: Tokenizer, config: PersimmonConfig
) -> None:
    gate = Gate(engine_client.load, Limits(sequences=1))
    async with client(engine_client, tokenizer, config, gate=gate) as http:
        with gate.reserved(1, 0):
            assert (await http.post("/v1/echo", json=TEXT)).status_code == 429
            assert (await http.post("/v1/plain-echo", json=TEXT)).status_code == 200
        assert (await http.post("/v1/echo", json=TEXT)).status_code == 200
        text = (await http.get("/metrics")).text
        assert 'persimmon_http_requests_total{endpoint="/v1/echo",status="429"} 1.0' in text
        gate.draining = True
        assert (await http.post("/v1/plain-echo", json=TEXT)).status_code == 503


async def test_it_is_measured_as_its_row_says(http: httpx.AsyncClient) -> None:
    await asyncio.gather(*(http.post(path, json=TEXT) for path in ("/v1/echo", "/v1/plain-echo")))
    for path in ("/reported/twice", "/probe"):
        await http.get(path)
    lines = (await http.get("/metrics")).text.splitlines()
    for path, status in (("/v1/echo", 200), ("/v1/plain-echo", 200), ("/reported/{word}", 203), ("/probe", 200)):
        assert f'persimmon_http_requests_total{{endpoint="{path}",status="{status}"}} 1.0' in lines
        counted = path != "/probe"
        assert (f'persimmon_http_request_duration_seconds_count{{endpoint="{path}"}} 1.0' in lines) is counted
        assert (f'http_requests_total{{handler="{path}",status="2xx"}} 1.0' in lines) is counted
    assert "persimmon_e2e_request_latency_seconds_count 1.0" in lines


async def test_the_access_log_has_a_line_for_it_unless_it_is_polled_and_well(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, observer.__name__)
    for path in ("/reported/twice", "/probe", "/reported/twice", "/probe"):
        await http.get(path)
    paths = [vars(each)["fields"]["path"] for each in caplog.records if each.getMessage() == "request"]
    assert paths == ["/reported/twice", "/reported/twice"]


async def test_a_line_of_a_batch_file_may_ask_for_it_where_its_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_lines, "URLS", batch_urls(ROWS))
    line = {"custom_id": "a", "method": "POST", "body": TEXT}
    read = batch_lines.read_request(json.dumps(line | {"url": "/v1/echo"}).encode(), 1)
    assert json.loads(read.body_bytes) == TEXT
    with pytest.raises(batch_lines.LineError, match="/v1/echo"):
        batch_lines.read_request(json.dumps(line | {"url": "/v1/plain-echo"}).encode(), 1)


def test_the_endpoints_that_a_model_is_said_to_be_for_exist() -> None:
    for use in USES.values():
        method = {endpoint.path: endpoint.method for endpoint in ENDPOINTS}[use.example[0]]
        assert method == "POST"
        assert set(use.endpoints.split(" or ")) <= set(addresses(ENDPOINTS))


def test_every_endpoint_that_generates_uses_the_engine_and_batch_lines_are_posts() -> None:
    for endpoint in ENDPOINTS:
        assert endpoint.uses_engine or not endpoint.generates
        assert endpoint.method == "POST" or not endpoint.in_batch_files
        assert endpoint.description
