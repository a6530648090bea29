"""Web pages of other origins, as browsers let them ask."""

from typing import Any

import httpx
import pytest

from persimmon.server.config import read_settings
from persimmon.server.engine.client import EngineClient
from persimmon.server.http.middleware.access import Access
from persimmon.server.http.middleware.keys import ApiKey, KeyRing
from persimmon.server.settings.section import SettingsError
from tests.server.http.fake_engine import FakeEngine, says
from tests.server.http.middleware.test_access import client

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/completions"
HELLO: dict[str, Any] = {"prompt": "Hello", "max_tokens": 2}
OWN_PAGES = ["localhost:8000", "127.0.0.1:8000", "[::1]:8000", "192.168.1.5:8000", "gpu-box", "app.localhost:8000"]


async def asked(http: httpx.AsyncClient, origin: str, host: str, **more: Any) -> httpx.Response:
    """The answer to a page's POST."""
    return await http.post(COMPLETIONS, **({"json": HELLO} | more), headers={"Origin": origin, "Host": host})


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("https://evil.example", "127.0.0.1:8000"),
        ("http://localhost:3000", "localhost:8000"),
        ("null", "127.0.0.1:8000"),
        ("", "127.0.0.1:8000"),
        ("file://", "127.0.0.1:8000"),
        ("http://127.0.0.1:8000.evil.example", "127.0.0.1:8000"),
        # A name of the page's own that resolves to this machine.
        ("http://evil.example:8000", "evil.example:8000"),
        ("https://evil.example", "evil.example"),
    ],
)
async def test_a_foreign_page_is_refused_before_anything_runs(
    http: httpx.AsyncClient, engine: FakeEngine, origin: str, host: str
) -> None:
    engine.script = says([9, 8])
    for body in ({"json": HELLO}, {"content": b'{"prompt": "Hello"}'}, {"data": {"prompt": "Hello"}}):
        response = await asked(http, origin, host, **({"json": None} | body))
        assert (response.status_code, response.json()["error"]["code"]) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in response.headers
    refused = await http.put("/api", json={}, headers={"Origin": origin, "Host": host})
    assert refused.status_code == 403
    assert engine.submitted == []


@pytest.mark.parametrize("host", OWN_PAGES)
async def test_the_servers_own_pages_may_ask(http: httpx.AsyncClient, engine: FakeEngine, host: str) -> None:
    engine.script = says([9, 8])
    for scheme in ("http", "https"):  # a proxy may speak TLS
        assert (await asked(http, f"{scheme}://{host}", host)).status_code == 200
    assert (await asked(http, "http://localhost", "localhost:80")).status_code == 200


async def test_with_keys_a_page_of_any_name_of_the_server_may_ask(
    engine: FakeEngine, engine_client: EngineClient
) -> None:
    engine.script = says([9, 8])
    async with client(engine_client, Access(KeyRing((ApiKey.of("alice", "correct-horse"),)))) as http:
        http.headers["Authorization"] = "Bearer correct-horse"
        assert (await asked(http, "https://llm.example.com", "llm.example.com")).status_code == 200
        assert (await asked(http, "https://evil.example", "llm.example.com")).status_code == 403


@pytest.mark.parametrize("allowed", ["https://evil.example", "*"])
async def test_pages_that_are_allowed_may_ask(engine: FakeEngine, engine_client: EngineClient, allowed: str) -> None:
    engine.script = says([9, 8])
    async with client(engine_client, Access(allowed_origins=(allowed,))) as http:
        response = await asked(http, "https://evil.example", "127.0.0.1:8000")
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == allowed
        other = await asked(http, "https://other.example", "127.0.0.1:8000")
        assert other.status_code == (200 if allowed == "*" else 403)


async def test_pages_may_read_what_does_no_work_as_far_as_their_browser_lets_them(http: httpx.AsyncClient) -> None:
    response = await http.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "json"])
async def test_a_body_that_is_not_said_to_be_json_is_a_415(http: httpx.AsyncClient, kind: str) -> None:
    response = await http.post(COMPLETIONS, content=b'{"prompt": "Hello"}', headers={"Content-Type": kind})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (415, "unsupported_media_type")
    assert "Content-Type: application/json" in error["message"]
    assert kind in error["message"]


@pytest.mark.parametrize(
    "kind", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json", None]
)
async def test_json_may_have_other_names_and_programs_may_leave_the_type_out(
    http: httpx.AsyncClient, engine: FakeEngine, kind: str | None
) -> None:
    engine.script = says([9, 8])
    headers = {} if kind is None else {"Content-Type": kind}
    response = await http.post(COMPLETIONS, content=b'{"prompt": "Hello", "max_tokens": 2}', headers=headers)
    assert response.status_code == 200


async def test_a_page_may_not_leave_the_type_out(http: httpx.AsyncClient) -> None:
    response = await asked(http, "http://localhost:8000", "localhost:8000", json=None, content=b'{"prompt": "Hello"}')
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("origin", ["chat.example.com", "https://chat.example.com/", "https://a b"])
def test_what_is_not_an_origin_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(SettingsError, match=r"--allowed-origins .*is not an origin"):
        read_settings({"allowed_origins": [origin]})
