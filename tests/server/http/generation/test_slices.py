"""Long loops let other tasks run: a body of thousands of prompts does not hold up other requests."""

import asyncio
import contextlib

import httpx
import pytest

from persimmon.server.engine.client import EngineClient
from persimmon.server.http.generation.slices import in_slices
from tests.server.http.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

PROMPTS = 600


@contextlib.asynccontextmanager
async def turns():
    """Counts the turns of the event loop in its only item."""
    count = [0]

    async def tick() -> None:
        while True:
            count[0] += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(tick())
    try:
        yield count
    finally:
        task.cancel()


async def test_others_have_a_turn_between_slices() -> None:
    async with turns() as count:
        seen = [(item, count[0]) async for item in in_slices(range(10), 3)]
    assert [item for item, _ in seen] == list(range(10))
    first = seen[0][1]
    assert [turn - first for _, turn in seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]


async def test_slices_end_with_their_cost() -> None:
    async with turns() as count:
        seen = [count[0] async for _ in in_slices([1, 9, 1, 1, 9], 5, cost=int)]
    assert [turn - seen[0] for turn in seen] == [0, 0, 1, 1, 1]


async def test_the_prompts_of_one_body_are_submitted_in_many_turns_and_room_is_kept_for_all(
    http: httpx.AsyncClient, engine: FakeEngine, engine_client: EngineClient
) -> None:
    """The load counts each prompt once, submitted or not."""
    prompts = [[5, 6, 7]] * PROMPTS
    loads: dict[int, tuple[int, int]] = {}
    request = asyncio.create_task(http.post("/v1/completions", json={"prompt": prompts, "max_tokens": 3}))
    while engine_client.open_streams < PROMPTS:
        if engine_client.open_streams:
            own = engine_client.load.own
            loads[engine_client.open_streams] = (own.sequences, own.prompt_tokens)
        await asyncio.sleep(0)
    assert len(loads) >= PROMPTS // 40
    assert set(loads.values()) == {(PROMPTS, 3 * PROMPTS)}
    await engine.submissions(PROMPTS)
    request.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await request
    assert sorted(await engine.aborts(PROMPTS)) == sorted(sample.sequence_id for sample in engine.submitted)
    assert (engine_client.load.own.sequences, engine_client.load.own.prompt_tokens) == (0, 0)


async def test_a_request_that_is_cancelled_while_its_prompts_are_submitted_leaves_nothing_behind(
    http: httpx.AsyncClient, engine: FakeEngine, engine_client: EngineClient
) -> None:
    request = asyncio.create_task(http.post("/v1/completions", json={"prompt": [[5]] * PROMPTS, "max_tokens": 3}))
    while not engine_client.open_streams:  # noqa: ASYNC110 - every turn counts
        await asyncio.sleep(0)
    assert engine_client.open_streams < PROMPTS
    request.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await request
    assert engine_client.open_streams == 0
    assert (engine_client.load.own.sequences, engine_client.load.own.prompt_tokens) == (0, 0)
