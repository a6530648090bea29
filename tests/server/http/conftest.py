"""An app of this repository on a fake engine: over ASGI for plain calls, over TCP where the connection matters."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

import persimmon.model.demo
from persimmon.model.config import PersimmonConfig
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.client import EngineClient
from persimmon.server.http.app import create_app
from tests.server.http.fake_engine import FakeEngine
from tests.server.http.raw import listening

DEMO = Path(next(iter(persimmon.model.demo.__path__)))


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


@pytest.fixture
async def server(
    engine_client: EngineClient, tokenizer: Tokenizer, config: PersimmonConfig
) -> AsyncIterator[LiveServer]:
    """The app on a port of this machine, in this event loop."""
    app = create_app(engine_client, tokenizer, config, "demo")
    async with listening(app) as (host, port):
        yield LiveServer(host, port)
