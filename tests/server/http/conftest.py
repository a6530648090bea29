"""An app of this repository on a fake engine: over ASGI for plain calls, over TCP where the connection matters."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn

import model.demo
from model.config import PersimmonConfig
from model.tokenizer import Tokenizer
from server.engine.client import EngineClient
from server.http.app import create_app
from tests.server.http.fake_engine import FakeEngine

DEMO = Path(next(iter(model.demo.__path__)))


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


@pytest.fixture(scope="session")
def config() -> PersimmonConfig:
    return PersimmonConfig.from_folder(DEMO)


@pytest.fixture
def tokens(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """The ids of a text, without BOS; decoded they begin with the space that SentencePiece puts before a text."""
    return lambda text: tokenizer.encode(text, add_bos=False)


@pytest.fixture
async def engine(anyio_backend: str) -> AsyncIterator[FakeEngine]:
    async with FakeEngine() as engine:
        yield engine


@pytest.fixture
async def engine_client(engine: FakeEngine) -> AsyncIterator[EngineClient]:
    """A connected client of a ready engine."""
    client = EngineClient(engine.address)
    await client.start()
    try:
        async with asyncio.timeout(20):
            await client.wait_until_ready()
        yield client
    finally:
        await client.close()


@pytest.fixture
async def http(
    engine_client: EngineClient, tokenizer: Tokenizer, config: PersimmonConfig
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app, with no network between them."""
    app = create_app(engine_client, tokenizer, config, "demo")
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client


@dataclass(frozen=True)
class LiveServer:
    """An app that listens on a port of this machine."""

    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # they are the test runner's
        yield


@pytest.fixture
async def server(
    engine_client: EngineClient, tokenizer: Tokenizer, config: PersimmonConfig
) -> AsyncIterator[LiveServer]:
    """The app behind uvicorn, in this event loop."""
    app = create_app(engine_client, tokenizer, config, "demo")
    listener = socket.create_server(("127.0.0.1", 0))
    uvicorn_config = uvicorn.Config(app, http="httptools", ws="none", lifespan="off", log_config=None, access_log=False)
    running = _Uvicorn(uvicorn_config)
    task = asyncio.create_task(running.serve(sockets=[listener]))
    try:
        yield LiveServer(*listener.getsockname())
    finally:
        running.should_exit = running.force_exit = True
        await task
