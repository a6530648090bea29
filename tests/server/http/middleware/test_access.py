"""Keys, limits, ids and the access log through the whole application."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from persimmon.model.config import PersimmonConfig
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.config import Settings, read_settings
from persimmon.server.engine.client import EngineClient
from persimmon.server.http.app import create_app
from persimmon.server.http.middleware import observer
from persimmon.server.http.middleware.access import Access, check
from persimmon.server.http.middleware.authentication import KeyCheck
from persimmon.server.http.middleware.credentials import reads_files_again
from persimmon.server.http.middleware.key_limits import KeyLimits
from persimmon.server.http.middleware.keys import ApiKey, KeyRing, salted
from persimmon.server.http.middleware.tracing import Tracing
from persimmon.server.http.transport.siblings import WorkerPlace
from persimmon.server.settings.section import SettingsError
from tests.server.http.fake_engine import FakeEngine, says

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/completions"
HELLO: dict[str, Any] = {"prompt": "Hello", "max_tokens": 2}
RING = KeyRing((ApiKey.of("alice", "correct-horse"), ApiKey.of("bob", "battery-staple")))
ALICE, BOB = {"Authorization": "Bearer correct-horse"}, {"Authorization": "Bearer battery-staple"}


@contextlib.asynccontextmanager
async def client(
    engine_client: EngineClient,
    access: Access,
    tracing: Tracing | None = None,
    key_check: KeyCheck | None = None,
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app that asks this of its clients."""
    folder = Path(__file__).parents[4] / "model" / "demo"
    tokenizer, config = Tokenizer.from_folder(folder), PersimmonConfig.from_folder(folder)
    app = create_app(engine_client, tokenizer, config, "demo", access=access, tracing=tracing, key_check=key_check)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
        yield http


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, observer.__name__)
    return caplog


def reported(lines: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The fields of the access log so far."""
    return [vars(record)["fields"] for record in lines.records if record.getMessage() == "request"]


async def test_without_a_key_or_with_a_wrong_one_nothing_is_answered(
    engine: FakeEngine, engine_client: EngineClient
) -> None:
    engine.script = says([9, 8])
    async with client(engine_client, Access(RING)) as http:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-Api-Key": "wrong"}, {"Api-Key": "wrong"}):
            for method, path in (("POST", COMPLETIONS), ("GET", "/v1/models"), ("GET", "/docs"), ("GET", "/nowhere")):
                response = await http.request(method, path, headers=headers, json=HELLO)
                assert response.status_code == 401
                assert response.headers["www-authenticate"].startswith("Bearer")
                error = response.json()["error"]
                assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert engine.submitted == []
        for headers in (ALICE, BOB):
            assert (await http.post(COMPLETIONS, headers=headers, json=HELLO)).status_code == 200


async def test_probes_need_no_key_and_metrics_only_where_that_is_asked(engine_client: EngineClient) -> None:
    open_paths = ["/health", "/livez", "/readyz", "/healthz", "/version"]
    for access, metrics_status in ((Access(RING), 200), (Access(RING, metrics_need_key=True), 401)):
        async with client(engine_client, access) as http:
            assert [(await http.get(path)).status_code for path in open_paths] == [200] * 5
            assert (await http.get("/metrics")).status_code == metrics_status
            assert (await http.get("/metrics", headers=BOB)).status_code == 200


async def test_each_key_and_each_salt_has_a_prefix_cache_of_its_own(
    engine: FakeEngine, engine_client: EngineClient
) -> None:
    engine.script = says([9, 8])
    async with client(engine_client, Access(RING)) as http:
        for headers, salt in ((ALICE, None), (ALICE, "a"), (BOB, None), (BOB, "a"), (BOB, "a")):
            await http.post(COMPLETIONS, headers=headers, json=HELLO | {"cache_salt": salt})
    salts = [sample.whole.cache_salt for sample in engine.submitted]
    assert salts[3] == salts[4]
    assert len(set(salts)) == 4
    assert salts[1] == salted(RING.keys[0].cache_salt, "a")


async def test_without_keys_only_a_requests_own_salt_keeps_it_apart(
    engine: FakeEngine, engine_client: EngineClient, http: httpx.AsyncClient
) -> None:
    engine.script = says([9, 8])
    for salt in (None, "a"):
        await http.post(COMPLETIONS, json=HELLO | {"cache_salt": salt})
    assert [sample.whole.cache_salt for sample in engine.submitted] == [b"", salted(b"", "a")]
    assert (await http.post(COMPLETIONS, json=HELLO | {"cache_salt": ""})).status_code == 400


async def test_a_keys_limits_are_a_429_that_says_when_to_come_again(
    engine: FakeEngine, engine_client: EngineClient
) -> None:
    async with client(engine_client, Access(RING, KeyLimits(concurrent=1))) as http, asyncio.TaskGroup() as tasks:
        first = tasks.create_task(http.post(COMPLETIONS, headers=ALICE, json=HELLO))
        [sample] = await engine.submissions(1)
        refused = await http.post(COMPLETIONS, headers=ALICE, json=HELLO)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert (await http.get("/v1/models", headers=BOB)).status_code == 200
        await engine.send(sample.sequence_id, [9], "length")
        assert (await first).status_code == 200
        assert (await http.get("/v1/models", headers=ALICE)).status_code == 200


async def test_keys_change_at_once_and_a_request_of_one_that_goes_is_answered_all_the_same(
    engine: FakeEngine, engine_client: EngineClient
) -> None:
    access = Access(RING, KeyLimits(concurrent=1))
    keys = access.key_check(WorkerPlace())
    carol = {"Authorization": "Bearer carols-key"}
    async with client(engine_client, access, key_check=keys) as http, asyncio.TaskGroup() as tasks:
        asking = [tasks.create_task(http.post(COMPLETIONS, headers=own, json=HELLO)) for own in (ALICE, BOB)]
        samples = await engine.submissions(2)
        keys.replace(KeyRing((ApiKey.of("carol", "carols-key"), RING.keys[1])))
        statuses = [(await http.get("/v1/models", headers=own)).status_code for own in (ALICE, BOB, carol)]
        assert statuses == [401, 429, 200]
        for sample in samples:
            await engine.send(sample.sequence_id, [9], "length")
    assert [task.result().status_code for task in asking] == [200, 200]


@pytest.mark.parametrize(("handler", "expected"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_hangup_has_the_file_of_keys_read_again_unless_it_is_ignored(
    handler: signal.Handlers, expected: bool
) -> None:
    before = signal.signal(signal.SIGHUP, handler)
    try:
        assert reads_files_again(Settings(api_key_file=Path("keys"))) == expected
        assert not reads_files_again(Settings())
    finally:
        signal.signal(signal.SIGHUP, before)


async def test_pages_of_other_origins_may_ask_only_where_that_is_allowed(
    engine_client: EngineClient, http: httpx.AsyncClient
) -> None:
    page = {"Origin": "https://chat.example.com"}
    preflight = page | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert "access-control-allow-origin" not in (await http.get("/v1/models", headers=page)).headers
    async with client(engine_client, Access(RING, allowed_origins=("https://chat.example.com",))) as allowed:
        asked = await allowed.options(COMPLETIONS, headers=preflight)
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, page["Origin"])
        refused = await allowed.get("/v1/models", headers=page)  # the page may read why
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, page["Origin"])
        other = await allowed.get("/v1/models", headers={"Origin": "https://evil.example.com"})
        assert "access-control-allow-origin" not in other.headers


async def test_a_body_that_is_too_long_is_refused_whether_it_says_so_or_not(engine_client: EngineClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b" " * 500

    async with client(engine_client, Access(max_body_bytes=1000)) as http:
        for content in (b" " * 1001, chunks()):
            response = await http.post(COMPLETIONS, content=content)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "request_too_large"
        assert (await http.post(COMPLETIONS, content=b" " * 1000)).json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize("path", [COMPLETIONS, "/health", "/nowhere", "/metrics"])
@pytest.mark.parametrize("given", ["a-b_C.9", "1" * 128, "trace=00-ab/c+d:e@f~"])
async def test_a_sane_request_id_comes_back(http: httpx.AsyncClient, path: str, given: str) -> None:
    response = await http.post(path, json={}, headers={"X-Request-Id": given})
    assert response.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", [None, "", "a b", "1" * 129, 'a"b', "a;b", "a%0ab"])
async def test_any_other_request_gets_an_id(http: httpx.AsyncClient, given: str | None) -> None:
    headers = {} if given is None else {"X-Request-Id": given}
    first, second = [(await http.get("/v1/models", headers=headers)).headers["x-request-id"] for _ in range(2)]
    assert given not in (first, second)
    assert first != second
    assert len(first) == 32


async def test_streams_bugs_and_the_engine_have_the_id_too(
    engine: FakeEngine,
    engine_client: EngineClient,
    http: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    lines: pytest.LogCaptureFixture,
) -> None:
    engine.script = says([9, 8])
    stream = await http.post(COMPLETIONS, json=HELLO | {"stream": True}, headers={"X-Request-Id": "mine"})
    assert stream.headers["x-request-id"] == "mine"
    assert [sample.whole.request_id for sample in engine.submitted] == ["mine"]

    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(engine_client, "submit", broken)
    bug = await http.post(COMPLETIONS, json=HELLO, headers={"X-Request-Id": "bug"})
    assert (bug.status_code, bug.headers["x-request-id"]) == (500, "bug")
    (logged,) = [record for record in lines.records if record.exc_info]
    assert vars(logged)["fields"] == {"request_id": "bug"}
    assert reported(lines)[-1]["status"] == 500


async def test_a_request_is_one_line_that_says_who_what_and_how_long(
    engine: FakeEngine, engine_client: EngineClient, lines: pytest.LogCaptureFixture
) -> None:
    engine.script = says([9, 8], cached_tokens=1)
    async with client(engine_client, Access(RING)) as http:
        response = await http.post(f"{COMPLETIONS}?token=secret", headers=ALICE, json=HELLO | {"n": 2})
    (line,) = reported(lines)
    assert line.pop("duration") >= line.pop("ttft") > 0
    usage = response.json()["usage"]
    assert line == {
        "request_id": response.headers["x-request-id"],
        "method": "POST",
        "path": COMPLETIONS,
        "status": 200,
        "queued": 0.0,
        "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": 1,
        "output_tokens": usage["completion_tokens"],
        "finish_reason": "length",
        "key": "alice",
        "client": "127.0.0.1",
    }
    assert "Hello" not in lines.text


async def test_prompts_are_logged_where_that_is_asked(
    engine: FakeEngine, engine_client: EngineClient, lines: pytest.LogCaptureFixture
) -> None:
    engine.script = says([9, 8])
    async with client(engine_client, Access(log_prompts=True)) as http:
        await http.post(COMPLETIONS, json=HELLO | {"prompt": ["Hello", "World"]})
        await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
        await http.get("/v1/models")
    completion, chat, models = reported(lines)
    assert completion["prompts"] == ["Hello", "World"]
    assert "Hi" in chat["prompts"][0]
    assert "prompts" not in models


async def test_probes_and_scrapes_are_lines_only_when_they_fail(
    http: httpx.AsyncClient, lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("/health", "/livez", "/readyz", "/healthz", "/metrics"):
        await http.get(path)
    assert reported(lines) == []
    await http.get("/nowhere")
    assert [line["path"] for line in reported(lines)] == ["/nowhere"]


async def test_a_line_tells_of_a_client_that_left(
    engine: FakeEngine, engine_client: EngineClient, http: httpx.AsyncClient, lines: pytest.LogCaptureFixture
) -> None:
    asking = asyncio.create_task(http.post(COMPLETIONS, json=HELLO))
    [sample] = await engine.submissions(1)
    asking.cancel()
    assert await engine.aborts(1) == [sample.sequence_id]
    (line,) = reported(lines)
    assert (line["status"], line["finish_reason"], line["complete"]) == (499, "abort", False)
    metrics = (await http.get("/metrics")).text
    assert (
        'vllm:request_success_total{engine="0",finished_reason="abort",model_name="demo"} 1.0' in metrics.splitlines()
    )


async def test_every_request_but_probes_is_a_span(engine: FakeEngine, engine_client: EngineClient) -> None:
    engine.script = says([9, 8])
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with client(engine_client, Access(), Tracing(provider, "demo")) as http:
        await http.get("/health")
        await http.post(COMPLETIONS, json=HELLO, headers={"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"})
    spans = exporter.get_finished_spans()
    assert [span.name for span in spans] == ["queue", "prefill", "decode", f"POST {COMPLETIONS}"]
    assert {f"{span.context.trace_id:x}" for span in spans if span.context} == {"ab" * 16}
    provider.shutdown()


def test_certificates_are_checked_before_anything_starts(tmp_path: Path) -> None:
    own, other = (trustme.CA().issue_cert("localhost") for _ in range(2))
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    own.cert_chain_pems[0].write_to_path(chain)
    own.private_key_pem.write_to_path(key)
    settings = Settings(ssl_certfile=chain, ssl_keyfile=key)
    check(settings)
    other.private_key_pem.write_to_path(key)
    with pytest.raises(SettingsError, match=r"chain.pem with --ssl-keyfile .*key.pem cannot be used: .*MISMATCH"):
        check(settings)
    key.unlink()
    with pytest.raises(SettingsError, match="No such file"):
        check(settings)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"ssl_certfile": "chain.pem"}, "--ssl-certfile and --ssl-keyfile are given together"),
        ({"requests_per_minute_per_key": "5"}, "--requests-per-minute-per-key needs keys"),
        ({"max_concurrent_requests_per_key": "5"}, "--max-concurrent-requests-per-key needs keys"),
        ({"protect_metrics": True}, "--protect-metrics needs keys"),
        ({"max_body_size": "0"}, "--max-body-size"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        read_settings(given)


def test_origins_may_come_one_by_one_or_with_commas() -> None:
    assert read_settings({"allowed_origins": ["https://a, https://b", "https://c"]}).allowed_origins == (
        "https://a",
        "https://b",
        "https://c",
    )


@pytest.mark.parametrize(
    ("headers", "priority", "status"),
    [(ALICE, -10, 200), (ALICE, -11, 400), (BOB, -2, 200), (BOB, -3, 400), (BOB, 2**31 - 1, 200)],
)
async def test_a_request_is_as_urgent_as_its_key_may_be(
    engine: FakeEngine, engine_client: EngineClient, headers: dict[str, str], priority: int, status: int
) -> None:
    engine.script = says([5])
    ring = KeyRing((ApiKey.of("alice", "correct-horse", max_priority=10, share=3), ApiKey.of("bob", "battery-staple")))
    async with client(engine_client, Access(ring, max_priority=2)) as http:
        response = await http.post(COMPLETIONS, json=HELLO | {"priority": priority}, headers=headers)
    assert response.status_code == status, response.text
    if status == 400:
        error = response.json()["error"]
        assert error["param"] == "priority"
        assert f"priority is {priority}" in error["message"]
        assert "--max-priority" in error["message"]
    else:
        asked = engine.submitted[0].whole
        assert (asked.priority, asked.owner, asked.weight) == (
            (priority, "alice", 3) if headers is ALICE else (priority, "bob", 1)
        )


async def test_without_keys_the_servers_urgency_counts(engine: FakeEngine, engine_client: EngineClient) -> None:
    engine.script = says([5])
    async with client(engine_client, Access.of(Settings())) as http:
        responses = [await http.post(COMPLETIONS, json=HELLO | {"priority": value}) for value in (-1, 0, 1)]
    assert [response.status_code for response in responses] == [400, 200, 200]


@pytest.mark.parametrize("path", ["/v1/embeddings", COMPLETIONS])
async def test_the_engine_is_told_whose_request_it_is(
    engine_client: EngineClient, engine: FakeEngine, path: str
) -> None:
    async with client(engine_client, Access(RING)) as http, asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(
            http.post(path, json={"input" if "embeddings" in path else "prompt": "a"}, headers=BOB)
        )
        submit = (await engine.submissions(1))[0]
        assert submit.whole.owner == "bob"
        asking.cancel()
