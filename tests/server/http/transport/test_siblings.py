"""API workers among others: what they tell one another, and what must not depend on which of them answers."""

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import httpx
import pytest

from persimmon.model.config import PersimmonConfig
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.client import EngineClient
from persimmon.server.http.app import create_app
from persimmon.server.http.errors import ApiError
from persimmon.server.http.transport.siblings import Siblings, WorkerPlace
from tests.server.http.fake_engine import FakeEngine, says

pytestmark = pytest.mark.anyio


def places(count: int, folder: Path) -> list[WorkerPlace]:
    return [WorkerPlace(index, count, folder, started=1234) for index in range(count)]


async def test_every_worker_sees_the_snapshots_of_all_in_one_order(tmp_path: Path) -> None:
    workers = [Siblings(place, f"worker {place.index}".encode) for place in places(3, tmp_path)]
    async with contextlib.AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(worker.listening())
        for worker in workers:
            assert await worker.snapshots() == [b"worker 0", b"worker 1", b"worker 2"]


async def test_a_worker_that_has_not_started_has_counted_nothing(tmp_path: Path) -> None:
    first, _ = places(2, tmp_path)
    worker = Siblings(first, lambda: b"own")
    async with worker.listening():
        assert await worker.snapshots() == [b"own"]


async def test_figures_without_those_of_a_worker_that_has_ended_are_not_told(tmp_path: Path) -> None:
    first, second = places(2, tmp_path)
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(second.socket(1)))
    worker = Siblings(first, lambda: b"own")
    async with worker.listening():
        with pytest.raises(ApiError, match="API worker 1 of 2 did not send its metrics"):
            await worker.snapshots()


async def test_a_worker_alone_opens_no_socket(tmp_path: Path) -> None:
    worker = Siblings(WorkerPlace(folder=tmp_path), lambda: b"own")
    async with worker.listening():
        assert await worker.snapshots() == [b"own"]
        assert os.listdir(tmp_path) == []


@contextlib.asynccontextmanager
async def apps(
    engine_client: EngineClient, tokenizer: Tokenizer, config: PersimmonConfig, folder: Path, count: int
) -> AsyncIterator[Sequence[httpx.AsyncClient]]:
    """A client of each worker's application; they share the connection to the engine."""
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for place in places(count, folder):
            app = create_app(engine_client, tokenizer, config, "demo", seed=7, place=place)
            await stack.enter_async_context(app.router.lifespan_context(app))
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            clients.append(
                await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://server"))
            )
        yield clients


async def seeds_of(
    engine: FakeEngine,
    engine_client: EngineClient,
    tokenizer: Tokenizer,
    config: PersimmonConfig,
    folder: Path,
    workers: int,
) -> list[int]:
    """The seeds of six requests that bring none, asked of each worker in turn."""
    already = len(engine.submitted)
    async with apps(engine_client, tokenizer, config, folder, workers) as clients:
        for turn in range(6):
            await clients[turn % workers].post("/v1/completions", json={"prompt": "Hello"})
    return [sample.sampling.seed for sample in engine.submitted[already:]]


async def test_workers_draw_the_seeds_that_one_alone_draws_and_none_twice(
    engine: FakeEngine, engine_client: EngineClient, tokenizer: Tokenizer, config: PersimmonConfig, tmp_path: Path
) -> None:
    engine.script = says([9])
    alone = await seeds_of(engine, engine_client, tokenizer, config, tmp_path, 1)
    assert len(set(alone)) == 6
    assert await seeds_of(engine, engine_client, tokenizer, config, tmp_path / "absent", 1) == alone
    shared = tmp_path / "shared"
    shared.mkdir()
    assert await seeds_of(engine, engine_client, tokenizer, config, shared, 3) == alone


async def test_metrics_and_models_are_the_same_whichever_worker_answers(
    engine: FakeEngine, engine_client: EngineClient, tokenizer: Tokenizer, config: PersimmonConfig, tmp_path: Path
) -> None:
    engine.script = says([9, 8])
    async with apps(engine_client, tokenizer, config, tmp_path, 2) as (first, second):
        for client in (first, first, second):
            await client.post("/v1/completions", json={"prompt": "Hello"})
        reported = [(await client.get("/metrics")).text for client in (first, second)]
        assert 'persimmon_http_requests_total{endpoint="/v1/completions",status="200"} 3.0' in reported[0].splitlines()
        assert "persimmon_time_to_first_token_seconds_count 3.0" in reported[0].splitlines()
        scrapes = 'endpoint="/metrics"'
        lines = [[line for line in text.splitlines() if scrapes not in line] for text in reported]
        assert lines[0] == lines[1]
        listed = [(await client.get("/v1/models")).json() for client in (first, second)]
        assert listed[0] == listed[1]
        assert listed[0]["data"][0]["created"] == 1234


async def test_metrics_are_refused_rather_than_told_in_part(
    engine_client: EngineClient, tokenizer: Tokenizer, config: PersimmonConfig, tmp_path: Path
) -> None:
    async with apps(engine_client, tokenizer, config, tmp_path, 2) as (first, _):
        socket_path = WorkerPlace(folder=tmp_path).socket(1)
        socket_path.unlink()
        with socket.socket(socket.AF_UNIX) as gone:
            gone.bind(str(socket_path))
        response = await first.get("/metrics")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "metrics_incomplete"
