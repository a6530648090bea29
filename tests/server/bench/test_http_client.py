import asyncio

import pytest

from persimmon.server.bench.http_client import Connection, ConnectionPool, Endpoint, Response
from tests.server.bench.fake_server import fake_server, sse, text_chunk


def test_a_connection_is_kept_for_the_next_request() -> None:
    async def run() -> None:
        async with fake_server() as (fake, endpoint), Connection(endpoint) as connection:
            for _ in range(3):
                assert (await connection.get("/v1/models")).status == 200
            assert fake.connections == 1

    asyncio.run(run())


def test_an_event_has_the_time_of_its_last_byte() -> None:
    body = sse(text_chunk("a"), text_chunk("é"))
    first_end = body.index(b"\n\n") + 2
    arrived = Response(0.0, pieces=[(1.0, body[:5]), (2.0, body[5 : first_end + 3]), (3.0, body[first_end + 3 :])])
    assert [read_at for read_at, _ in arrived.events()] == [2.0, 3.0]


def test_carriage_returns_and_comments_are_no_part_of_an_event() -> None:
    arrived = Response(0.0, pieces=[(1.0, b": ping\r\n\r\ndata: {}\r\n\r\nevent: x\r\ndata:[DONE]\r\n\r\n")])
    assert [data for _, data in arrived.events()] == [b"{}", b"[DONE]"]


def test_base_urls_are_read() -> None:
    assert Endpoint.from_url("http://127.0.0.1:8000") == Endpoint("127.0.0.1", 8000)
    assert Endpoint.from_url("https://example.org/api/") == Endpoint("example.org", 443, "/api", encrypted=True)
    with pytest.raises(ValueError, match="not a server URL"):
        Endpoint.from_url("localhost:8000")
    assert Endpoint.from_url("http://127.0.0.1:8000/v1") == Endpoint("127.0.0.1", 8000)
    assert Endpoint.from_url("http://[::1]:80/api/v1").url == "http://[::1]:80/api"
    with pytest.raises(ValueError, match="not a server URL"):
        Endpoint.from_url("http://host:no_port")


def test_a_key_is_sent_and_never_shown() -> None:
    async def run() -> None:
        async with fake_server() as (fake, endpoint):
            locked = Endpoint.from_url(endpoint.url, "secret")
            async with Connection(locked) as connection:
                await connection.get("/v1/models")
            assert b"\r\nAuthorization: Bearer secret\r\n" in fake.heads[0]
            assert "secret" not in repr(locked) + locked.url

    asyncio.run(run())


def test_a_key_that_would_break_the_request_is_refused() -> None:
    with pytest.raises(ValueError, match="printable ASCII"):
        Endpoint.from_url("http://127.0.0.1:8000", "secret\r\nHost: other")


def test_no_key_is_sent_where_none_is_given() -> None:
    async def run() -> None:
        async with fake_server() as (fake, endpoint), Connection(endpoint) as connection:
            await connection.get("/v1/models")
            assert b"Authorization" not in fake.heads[0]

    asyncio.run(run())


def test_a_pool_has_as_many_connections_as_requests_in_flight() -> None:
    async def run() -> None:
        body = b'{"prompt": [1], "max_tokens": 4}'
        async with fake_server() as (fake, endpoint), ConnectionPool(endpoint) as pool:
            for _ in range(3):
                await asyncio.gather(*(pool.post("/v1/completions", body) for _ in range(2)))
            assert fake.connections == 2

    asyncio.run(run())


def test_a_connection_that_was_idle_for_long_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConnectionPool, "IDLE_SECONDS", -1.0)

    async def run() -> None:
        body = b'{"prompt": [1], "max_tokens": 4}'
        async with fake_server() as (fake, endpoint), ConnectionPool(endpoint) as pool:
            for _ in range(2):
                assert (await pool.post("/v1/completions", body)).status == 200
            assert fake.connections == 2

    asyncio.run(run())
