"""Which endpoint an address means, through the whole application."""

import httpx
import pytest

from tests.server.http.fake_engine import FakeEngine, says

pytestmark = pytest.mark.anyio

HELLO = {"prompt": "Hello", "max_tokens": 2}


@pytest.mark.parametrize(
    "path",
    [
        "/v1/completions",
        "/v1/completions/",
        "//v1/completions",
        "/v1//completions",
        "/completions",
        "/completions/",
        "/v1/v1/completions",
        "/v1/%63ompletions",
    ],
)
async def test_base_urls_with_a_slash_or_a_version_too_many_or_too_few_are_understood(
    http: httpx.AsyncClient, engine: FakeEngine, path: str
) -> None:
    engine.script = says([9, 8])
    response = await http.post(path, json=HELLO)
    assert (response.status_code, response.json()["object"]) == (200, "text_completion")
    counted = 'persimmon_http_requests_total{endpoint="/v1/completions",status="200"} 1.0'
    assert counted in (await http.get("/metrics")).text


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/models", "/models/", "/v1/v1/models"])
async def test_models_are_listed_wherever_a_client_may_look(http: httpx.AsyncClient, path: str) -> None:
    assert (await http.get(path)).json() == (await http.get("/v1/models")).json()


async def test_endpoints_without_a_version_are_found_with_one_too(http: httpx.AsyncClient) -> None:
    for path in ("/tokenize", "/v1/tokenize", "/tokenize/"):
        assert (await http.post(path, json={"prompt": "Hello"})).json()["count"] > 0


async def test_one_model_is_described_by_its_name_and_its_name_alone(http: httpx.AsyncClient) -> None:
    assert (await http.get("/v1/models/demo")).json()["id"] == "demo"
    assert (await http.get("/v1/models/demo/")).json()["id"] == "demo"
    assert (await http.get("/v1/models/other")).json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("/v1/chat/completion", "Did you mean /v1/chat/completions?"),
        ("/v2/completions", "Did you mean /v1/completions?"),
        ("/nowhere", "GET /docs lists all URLs."),
        ("/", "GET /docs lists all URLs."),
    ],
)
async def test_an_unknown_address_is_a_404_that_says_where_to_go(
    http: httpx.AsyncClient, path: str, remedy: str
) -> None:
    response = await http.post(path, json=HELLO)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (404, "unknown_url")
    assert error["message"] == f"Unknown URL: POST {path}. {remedy}"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/completions", "POST"),
        ("HEAD", "/v1/completions", "POST"),
        ("POST", "/api", "PUT"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", "/health", "GET, HEAD"),
        ("OPTIONS", "/v1/chat/completions", "POST"),
    ],
)
async def test_a_wrong_method_is_a_405_that_names_the_right_one(
    http: httpx.AsyncClient, method: str, path: str, allowed: str
) -> None:
    response = await http.request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allowed)
    if method != "HEAD":
        assert f"use {allowed.replace(', ', ' or ')}." in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/health", "/livez", "/v1/models", "/metrics", "/version", "/docs", "/openapi.json"])
async def test_head_gives_what_get_gives_without_the_body(http: httpx.AsyncClient, path: str) -> None:
    head, get = await http.head(path), await http.get(path)
    assert (head.status_code, head.headers["content-type"]) == (200, get.headers["content-type"])
    assert head.content == b""
    assert int(head.headers["content-length"]) > 0


async def test_nothing_is_redirected(http: httpx.AsyncClient) -> None:
    for path in ("/docs/", "/health/", "/metrics/", "/v1/models/", "/openapi.json/"):
        assert (await http.get(path)).status_code == 200
