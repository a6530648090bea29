import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.serve import (
    RequestFailedError,
    Workload,
    measure,
    measure_warm,
    number_range,
    read_answer,
    served_model,
    warm_up,
)
from benchmarks.streaming_client import Connection, Endpoint, Response

SMALL = Workload(prompts=6, streams=2, input_len=(3, 9), output_len=4)


def sse(*chunks: dict[str, Any] | str) -> bytes:
    return b"".join(
        b"data: %s\n\n" % (chunk if isinstance(chunk, str) else json.dumps(chunk)).encode() for chunk in chunks
    )


def text_chunk(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text}]}


def usage_chunk(completion_tokens: int, prompt_tokens: int = 3) -> dict[str, Any]:
    return {
        "choices": [],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens},
    }


def response(body: bytes, status: int = 200) -> Response:
    return Response(started=1.0, finished=3.0, status=status, pieces=[(2.0, body)])


class FakeServer:
    """Answers completions with two chunks of text for four tokens, after a turn of the event loop."""

    def __init__(self) -> None:
        self.prompts: list[tuple[int, ...]] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.connections = 0
        self.answer: Callable[[dict[str, Any]], bytes] = self.completion

    @staticmethod
    def completion(request: dict[str, Any]) -> bytes:
        usage = usage_chunk(request["max_tokens"], len(request["prompt"]))
        events = sse(text_chunk("one two"), text_chunk(" three four"), usage, "[DONE]")
        return http_response(events)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length:")[1].split()[0])
                body = await reader.readexactly(length)
                if head.startswith(b"GET /v1/models"):
                    writer.write(http_response(json.dumps({"data": [{"id": "fake"}]}).encode()))
                    continue
                request = json.loads(body)
                self.prompts.append(tuple(request["prompt"]))
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                await asyncio.sleep(0)
                self.in_flight -= 1
                writer.write(self.answer(request))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def http_response(body: bytes, status: str = "200 OK") -> bytes:
    # In chunks that cut lines and characters anywhere, as a network does.
    pieces = [body[start : start + 7] for start in range(0, len(body), 7)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + chunks + b"0\r\n\r\n"


@asynccontextmanager
async def fake_server() -> AsyncIterator[tuple[FakeServer, Endpoint]]:
    fake = FakeServer()
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    try:
        yield fake, Endpoint("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()


def test_each_prompt_is_sent_once_and_never_more_streams_than_asked_for() -> None:
    async def run() -> None:
        async with fake_server() as (fake, endpoint):
            report = (await measure(endpoint, "fake", SMALL)).report
            sent = sorted(tuple(json.loads(body)["prompt"]) for body in SMALL.bodies("fake"))
            assert sorted(fake.prompts) == sent
            assert fake.most_in_flight <= SMALL.streams
            assert fake.connections == SMALL.streams
            assert report.answered == SMALL.prompts
            assert report.errors == {}

    asyncio.run(run())


def test_tokens_are_counted_by_usage_and_not_by_chunks() -> None:
    async def run() -> None:
        async with fake_server() as (_, endpoint):
            result = await measure(endpoint, "fake", SMALL)
            assert result.report.output_tokens == SMALL.prompts * 4
            assert result.report.chunks_per_token == 0.5
            assert result.answers[0] is not None
            assert result.answers[0].text == "one two three four"

    asyncio.run(run())


def test_failed_requests_are_counted_by_cause_and_leave_the_others_standing() -> None:
    async def run() -> None:
        async with fake_server() as (fake, endpoint):

            def answer(request: dict[str, Any]) -> bytes:
                turn = len(fake.prompts)
                return http_response(b"full", "503 Busy") if turn % 2 else FakeServer.completion(request)

            fake.answer = answer
            report = (await measure(endpoint, "fake", replace(SMALL, streams=1))).report
            assert report.answered == 3
            assert report.errors == {"HTTP 503: full": 3}
            assert report.output_tokens == 3 * 4

    asyncio.run(run())


def test_a_connection_that_breaks_in_the_middle_of_an_answer_is_an_error() -> None:
    async def run() -> None:
        async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(FakeServer.completion({"max_tokens": 4, "prompt": [1]})[:60])
            writer.close()

        server = await asyncio.start_server(cut, "127.0.0.1", 0)
        endpoint = Endpoint("127.0.0.1", server.sockets[0].getsockname()[1])
        report = (await measure(endpoint, "fake", replace(SMALL, prompts=2))).report
        assert report.answered == 0
        assert sum(report.errors.values()) == 2
        assert "in the middle of an answer" in next(iter(report.errors))
        server.close()

    asyncio.run(run())


def test_a_server_that_never_answers_is_an_error_after_the_timeout() -> None:
    async def run() -> None:
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        endpoint = Endpoint("127.0.0.1", server.sockets[0].getsockname()[1])
        report = (await measure(endpoint, "fake", replace(SMALL, prompts=2), timeout_s=0.05)).report
        assert report.errors == {"no whole answer within 0.05 s": 2}
        server.close()

    asyncio.run(run())


def test_the_warm_up_sends_other_prompts_than_the_measurement() -> None:
    async def run() -> None:
        async with fake_server() as (fake, endpoint):
            await warm_up(endpoint, "fake", SMALL)
            warm = set(fake.prompts)
            fake.prompts.clear()
            await measure_warm(endpoint, None, SMALL)
            assert warm.isdisjoint(fake.prompts[SMALL.prompts :])

    asyncio.run(run())


def test_the_model_is_the_first_that_the_server_lists() -> None:
    async def run() -> None:
        async with fake_server() as (_, endpoint):
            assert await served_model(endpoint) == "fake"

    asyncio.run(run())


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


def test_chunks_without_text_are_no_arrivals() -> None:
    answer = read_answer(response(sse(text_chunk(""), text_chunk("a"), usage_chunk(4), "[DONE]")), 4)
    assert len(answer.arrivals) == 1
    assert answer.time_to_first_token == 1.0


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b'{"error": "no"}', 400, "HTTP 400"),
        (sse(text_chunk("a"), {"error": {"message": "died"}}), 200, "died"),
        (sse(text_chunk("a"), "[DONE]"), 200, "no usage"),
        (sse(text_chunk("a"), usage_chunk(4)), 200, r"without \[DONE\]"),
        (sse(text_chunk("a"), usage_chunk(3), "[DONE]"), 200, "3 tokens instead of the 4"),
        (sse(usage_chunk(4), "[DONE]"), 200, "no text"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_an_error(body: bytes, status: int, reason: str) -> None:
    with pytest.raises(RequestFailedError, match=reason):
        read_answer(response(body, status), expected_tokens=4)


def test_prompts_keep_to_their_lengths_and_ids_and_repeat_with_the_seed() -> None:
    workload = Workload(prompts=50, streams=1, input_len=(2, 5), token_ids=(10, 12), seed=7)
    prompts = [json.loads(body)["prompt"] for body in workload.bodies("fake")]
    assert {len(prompt) for prompt in prompts} == {2, 3, 4, 5}
    assert {token for prompt in prompts for token in prompt} == {10, 11}
    assert workload.bodies("fake") == workload.bodies("fake")


@pytest.mark.parametrize(
    "wrong",
    [{"streams": 0}, {"streams": 9, "prompts": 8}, {"input_len": (5, 4)}, {"output_len": 0}, {"token_ids": (9, 9)}],
)
def test_a_workload_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="it needs"):
        Workload(**wrong)


def test_lengths_are_a_number_or_a_range() -> None:
    assert number_range("64") == (64, 64)
    assert number_range("32:512") == (32, 512)


def test_base_urls_are_read() -> None:
    assert Endpoint.from_url("http://127.0.0.1:8000") == Endpoint("127.0.0.1", 8000)
    assert Endpoint.from_url("https://example.org/api/") == Endpoint("example.org", 443, "/api", encrypted=True)
    with pytest.raises(ValueError, match="no server's URL"):
        Endpoint.from_url("localhost:8000")
