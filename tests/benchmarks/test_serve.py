import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.serve import Workload, measure, measure_warm, warm_up
from persimmon.server.bench.http_client import Endpoint
from tests.server.bench.fake_server import FakeServer, fake_server, http_response

SMALL = Workload(prompts=6, streams=2, input_len=(3, 9), output_len=(4, 4))


def test_each_prompt_is_sent_once_and_never_more_streams_than_asked_for() -> None:
    async def run() -> None:
        async with fake_server() as (fake, endpoint):
            report = (await measure(endpoint, "fake", SMALL)).report
            sent = sorted(tuple(json.loads(each.body)["prompt"]) for each in SMALL.requests("fake"))
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
        assert "during an answer" in next(iter(report.errors))
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
        assert report.errors == {"no complete answer within 0.05 s": 2}
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


def test_prompts_keep_to_their_lengths_and_ids_and_repeat_with_the_seed() -> None:
    workload = Workload(prompts=50, streams=1, input_len=(2, 5), token_ids=(10, 12), seed=7)
    prompts = [json.loads(each.body)["prompt"] for each in workload.requests("fake")]
    assert {len(prompt) for prompt in prompts} == {2, 3, 4, 5}
    assert {token for prompt in prompts for token in prompt} == {10, 11}
    assert workload.requests("fake") == workload.requests("fake")


@pytest.mark.parametrize(
    "wrong",
    [
        {"streams": 0},
        {"streams": 9, "prompts": 8},
        {"input_len": (5, 4)},
        {"output_len": (0, 4)},
        {"token_ids": (9, 9)},
    ],
)
def test_a_workload_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected "):
        Workload(**wrong)
