"""What probes and metrics say of a server of several engines."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest

from persimmon.model.config import PersimmonConfig
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.client import GENERATES
from persimmon.server.engine.engines import Engines
from persimmon.server.engine.load import Load
from persimmon.server.http.app import create_app
from persimmon.server.http.middleware.gate import Gate, Limits
from persimmon.server.vitals import Vitals
from tests.server.http.fake_engine import BLOCK_SIZE, FakeEngine, says

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/completions"


class Clock:
    nanoseconds = 10**12

    def __call__(self) -> int:
        return self.nanoseconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def vitals(clock: Clock) -> Vitals:
    return Vitals.private(1, clock, engines=2)


@pytest.fixture
async def fakes(tmp_path: Path, anyio_backend: str) -> AsyncIterator[list[FakeEngine]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(FakeEngine(says([9]), address=f"ipc://{tmp_path}/{number}"))
            for number in range(2)
        ]


@pytest.fixture
async def http(
    fakes: list[FakeEngine], vitals: Vitals, tokenizer: Tokenizer, config: PersimmonConfig
) -> AsyncIterator[httpx.AsyncClient]:
    gate = Gate(Load(vitals), Limits(step_timeout=30))
    engines = Engines([fake.address for fake in fakes], None, gate.load, GENERATES, block_size=BLOCK_SIZE)
    await engines.start()
    app = create_app(engines, tokenizer, config, "demo", gate=gate)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
        await until(http, lambda health: health.json()["status"] == "ready")
        yield http
    await engines.close()


async def until(http: httpx.AsyncClient, holds: Callable[[httpx.Response], bool]) -> httpx.Response:
    """The first answer of /health of which something holds."""
    async with asyncio.timeout(20):
        while not holds(health := await http.get("/health")):  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.002)
    return health


async def test_a_server_is_degraded_and_healthy_while_one_engine_serves(
    http: httpx.AsyncClient, fakes: list[FakeEngine]
) -> None:
    await fakes[1].die()
    health = await until(http, lambda health: health.json()["status"] != "ready")
    assert health.status_code == 200
    assert health.json() == {
        "status": "degraded",
        "reason": "1 of 2 engines serves; engine 1: the engine has stopped",
    }
    assert (await http.get("/readyz")).status_code == 200
    assert (await http.get("/healthz")).status_code == 200
    for _ in range(3):
        assert (await http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1})).status_code == 200
    metrics = (await http.get("/metrics")).text
    assert 'persimmon_engine_ready{engine="0"} 1.0' in metrics
    assert 'persimmon_engine_ready{engine="1"} 0.0' in metrics
    assert 'vllm:num_requests_running{engine="0",model_name="demo"} 3.0' in metrics
    async with FakeEngine(says([9]), address=fakes[1].address):
        await until(http, lambda health: health.json() == {"status": "ready"})


async def test_without_an_engine_a_server_is_dead(http: httpx.AsyncClient, fakes: list[FakeEngine]) -> None:
    for fake in fakes:
        await fake.die()
    health = await until(http, lambda health: health.status_code == 503)
    assert health.json()["status"] == "dead"
    refused = await http.post(COMPLETIONS, json={"prompt": "a"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")


async def test_one_engine_that_hangs_degrades_a_server(http: httpx.AsyncClient, vitals: Vitals, clock: Clock) -> None:
    vitals.beat(True, engine=0)
    clock.nanoseconds += 31 * 10**9
    health = await http.get("/health")
    assert (health.status_code, health.json()["status"]) == (200, "degraded")
    assert "engine 0: the engine has work but has not finished a step for 31 s" in health.json()["reason"]
    vitals.beat(True, engine=1)
    clock.nanoseconds += 31 * 10**9
    health = await http.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "hung")
