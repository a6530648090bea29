"""What the access log says of requests that were refused or failed, and of probes."""

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from persimmon.model.config import PersimmonConfig
from persimmon.model.tokenizer import Tokenizer
from persimmon.server import logs
from persimmon.server.engine.client import EngineClient, EngineDeadError
from persimmon.server.engine.messages import SequenceOutput, Submit
from persimmon.server.http.app import create_app
from persimmon.server.http.middleware import observer
from persimmon.server.http.middleware.access import Access
from persimmon.server.http.middleware.keys import ApiKey, KeyRing
from persimmon.server.http.middleware.tracing import Tracing
from tests.server.http.conftest import LiveServer
from tests.server.http.fake_engine import FakeEngine, outputs

pytestmark = pytest.mark.anyio

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SECRET = "my aunt's diary"
HELLO: dict[str, Any] = {"prompt": "Hello", "max_tokens": 2}


class Log:
    """The fields of the access log's lines."""

    def __init__(self, captured: pytest.LogCaptureFixture) -> None:
        self._captured = captured

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [vars(record)["fields"] for record in self._captured.records if record.getMessage() == "request"]

    @property
    def last(self) -> dict[str, Any]:
        return self.lines[-1]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    caplog.set_level(logging.INFO, observer.__name__)
    return Log(caplog)


def client_of(engine_client: EngineClient, tokenizer: Tokenizer, config: PersimmonConfig, **settings: Any) -> Any:
    """A client of an app with these settings."""
    app = create_app(engine_client, tokenizer, config, "demo", **settings)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server")


@pytest.mark.parametrize(
    ("path", "body", "status", "error", "param"),
    [
        (
            COMPLETIONS,
            HELLO | {"temperature": 3},
            400,
            "Invalid 'temperature': input should be less than",
            "temperature",
        ),
        (COMPLETIONS, HELLO | {"max_tokens": 9000}, 400, "This model's maximum context length is 2048", "max_tokens"),
        (COMPLETIONS, {}, 400, "Missing required parameter: 'prompt'.", "prompt"),
        (COMPLETIONS, HELLO | {"colour": "red"}, 400, "Unknown parameter: 'colour'.", "colour"),
        (COMPLETIONS, HELLO | {"model": "gpt-4"}, 404, "The model 'gpt-4' does not exist", "model"),
        (
            COMPLETIONS,
            HELLO | {"logit_bias": {"99999": 1}},
            400,
            "logit_bias contains the token id 99999",
            "logit_bias",
        ),
        (CHAT, {"messages": [{"role": "bot", "content": ""}]}, 400, "Invalid 'messages': ", "messages"),
        ("/nowhere", {}, 404, "Unknown URL: POST /nowhere.", None),
        ("/health", {}, 405, "POST is not allowed on /health", None),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
async def test_a_refusal_says_why(
    http: httpx.AsyncClient, log: Log, path: str, body: dict[str, Any], status: int, error: str, param: str | None
) -> None:
    answer = await http.post(path, json=body)
    assert answer.status_code == log.last["status"] == status
    assert log.last["error"].startswith(error)
    assert log.last["error"] == answer.json()["error"]["message"]
    assert log.last.get("param") == answer.json()["error"]["param"] == param


async def test_what_is_well_has_no_error(engine: FakeEngine, http: httpx.AsyncClient, log: Log) -> None:
    engine.script = lambda sample: outputs(sample.sequence_id, [[9], [8]])
    await http.post(COMPLETIONS, json=HELLO)
    assert not {"error", "param"} & log.last.keys()


async def test_refusals_before_the_body_is_read_say_why_too(
    engine_client: EngineClient, tokenizer: Tokenizer, config: PersimmonConfig, log: Log
) -> None:
    access = Access(KeyRing((ApiKey.of("alice", "correct-horse"),)), max_body_bytes=1000)
    async with client_of(engine_client, tokenizer, config, access=access) as http:
        for headers in ({}, {"Authorization": "Bearer battery-staple"}):
            answer = await http.post(COMPLETIONS, json=HELLO, headers=headers)
            assert log.last["status"] == 401
            assert log.last["error"] == answer.json()["error"]["message"]
            assert "battery-staple" not in str(log.last)
        await http.post(COMPLETIONS, content=b" " * 1001, headers={"Authorization": "Bearer correct-horse"})
        assert (log.last["status"], log.last["key"]) == (413, "alice")
        assert "1000" in log.last["error"]


@pytest.mark.parametrize(
    "body",
    [
        {"messages": SECRET},
        {"messages": [SECRET]},
        {"messages": [{"role": "user", "content": [SECRET]}]},
        {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": SECRET},
        {"messages": [{"role": "user", "content": "Hello"}], "stop": [SECRET * 100]},
    ],
    ids=str,
)
async def test_an_error_quotes_the_request_only_where_prompts_are_logged(
    engine_client: EngineClient, tokenizer: Tokenizer, config: PersimmonConfig, log: Log, body: dict[str, Any]
) -> None:
    for shown in (False, True):
        async with client_of(engine_client, tokenizer, config, access=Access(log_prompts=shown)) as http:
            answer = await http.post(CHAT, json=body)
        assert answer.status_code == 400
        assert log.last["error"].startswith("Invalid '")
        assert (SECRET in log.last["error"]) == (shown and SECRET in answer.json()["error"]["message"])


async def test_an_error_in_the_log_has_a_bounded_length(http: httpx.AsyncClient, log: Log) -> None:
    await http.post(COMPLETIONS, json=HELLO | {"x" * 5000: 1})
    assert (len(log.last["error"]), len(log.last["param"])) == (300, 300)


async def test_a_stream_that_fails_after_it_began_says_why(engine: FakeEngine, server: LiveServer, log: Log) -> None:
    engine.script = lambda sample: [SequenceOutput(sample.sequence_id, [9])]
    body = json.dumps(HELLO | {"stream": True})
    async with httpx.AsyncClient(base_url=server.url) as http, http.stream("POST", COMPLETIONS, content=body) as answer:
        parts = answer.aiter_text()
        await anext(parts)
        await engine.send_output(SequenceOutput(engine.submitted[0].sequence_id, [], "error", error="It broke."))
        assert "It broke." in "".join([part async for part in parts])
    assert (log.last["status"], log.last["finish_reason"], log.last["error"]) == (200, "error", "It broke.")


async def test_a_client_that_left_is_the_reason_of_its_status(
    engine: FakeEngine, http: httpx.AsyncClient, log: Log
) -> None:
    asking = asyncio.create_task(http.post(COMPLETIONS, json=HELLO))
    [sample] = await engine.submissions(1)
    asking.cancel()
    assert await engine.aborts(1) == [sample.sequence_id]
    assert log.last["status"] == 499
    assert log.last["error"].startswith("The client closed the connection")


async def test_probes_are_lines_when_their_answer_changes_and_are_never_spans(
    tokenizer: Tokenizer, config: PersimmonConfig, log: Log
) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    engine = FakeEngine(ready=False)
    async with engine:
        engine_client = EngineClient(engine.address)
        await engine_client.start()
        async with client_of(engine_client, tokenizer, config, tracing=Tracing(provider, "demo")) as http:

            async def probed(count: int) -> None:
                for path in ("/health", "/readyz", "/healthz", "/livez", "/metrics"):
                    for _ in range(count):
                        await http.get(path)

            await probed(5)
            loading = [(line["path"], line["status"], line["error"]) for line in log.lines]
            assert loading == [(path, 503, "loading") for path in ("/health", "/readyz", "/healthz")]
            await engine.become_ready()
            async with asyncio.timeout(20):
                await engine_client.wait_until_ready()
            await probed(5)
            ready = [(line["path"], line["status"], line.get("error")) for line in log.lines[3:]]
            assert ready == [(path, 200, None) for path in ("/health", "/readyz", "/healthz")]
            with engine_client.submit(Submit(token_ids=[5], max_tokens=9)) as (stream,):
                await engine.die()
                with pytest.raises(EngineDeadError):
                    await anext(stream)
            await probed(3)
            assert [line["status"] for line in log.lines[6:]] == [503] * 3
            await http.get("/v1/models")
        await engine_client.close()
    assert [span.name for span in exporter.get_finished_spans()] == ["GET /v1/models"]
    provider.shutdown()


@pytest.fixture
def console() -> Iterator[None]:
    """The loggers as they were, whatever a test configures."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logs.configure("tests")
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("persimmon").setLevel(logging.NOTSET)


@pytest.mark.usefixtures("console")
@pytest.mark.parametrize("log_format", ["json", "text"])
async def test_both_formats_have_error_and_param(
    http: httpx.AsyncClient, capsys: pytest.CaptureFixture[str], log_format: logs.LogFormat
) -> None:
    logs.configure("api worker", log_format)
    answer = await http.post(COMPLETIONS, json=HELLO | {"n": "two\nlines"})
    logs.configure("tests")
    (line,) = [
        each
        for each in capsys.readouterr().err.splitlines()
        if "persimmon.server.http.middleware.observer" in each or ": request " in each
    ]
    error = "Invalid 'n': input should be a valid integer"
    assert answer.json()["error"]["message"].startswith(error)
    if log_format == "json":
        shown = json.loads(line)
        assert shown["error"].startswith(error)
        assert shown["param"] == "n"
    else:
        assert f' status=400 error="{error}' in line
        assert " param=n " in line
