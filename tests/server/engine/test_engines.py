"""Several engines behind one worker: prompts go where they should, and an engine's end is not the others'."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from persimmon.model.sampling_params import SamplingParams
from persimmon.server.engine.blocks import block_hashes, salted_with_length
from persimmon.server.engine.client import GENERATES, EngineDeadError, EngineNotReadyError
from persimmon.server.engine.engines import Engines
from persimmon.server.engine.load import Load
from persimmon.server.engine.messages import PromptSpan, Submit, bytes_of_spans
from persimmon.server.vitals import Vitals, WorkerLoad
from tests.server.http.fake_engine import BLOCK_SIZE, FakeEngine

pytestmark = pytest.mark.anyio

PATIENCE = 20.0
PREFIX = list(range(8 * BLOCK_SIZE))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def fakes(anyio_backend: str, tmp_path: Path) -> AsyncIterator[list[FakeEngine]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(FakeEngine(address=f"ipc://{tmp_path}/engine-{number}"))
            for number in range(2)
        ]


@contextlib.asynccontextmanager
async def connected(fakes: Sequence[FakeEngine], **more: bool) -> AsyncIterator[Engines]:
    load = Load(Vitals.private(engines=len(fakes)))
    engines = Engines([fake.address for fake in fakes], None, load, GENERATES, block_size=BLOCK_SIZE, **more)
    await engines.start()
    try:
        yield engines
    finally:
        await engines.close()


@pytest.fixture
async def engines(fakes: list[FakeEngine]) -> AsyncIterator[Engines]:
    async with connected(fakes) as engines:
        await until(lambda: all(engine.ready for engine in engines.engines))
        yield engines


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not happened():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.002)


def prompt(token_ids: Sequence[int], **more: object) -> Submit:
    return Submit(token_ids=list(token_ids), max_tokens=4, sampling=SamplingParams(temperature=0), **more)  # type: ignore[arg-type]


def submitted(fakes: Sequence[FakeEngine]) -> list[int]:
    """How many sequences each engine has got."""
    return [len(fake.submitted) for fake in fakes]


async def knows(
    engines: Engines,
    number: int,
    fake: FakeEngine,
    token_ids: Sequence[int],
    salt: bytes = b"",
    spans: Sequence[PromptSpan] = (),
) -> None:
    """An engine has cached some tokens, and the worker has heard of it."""
    hashes = list(block_hashes(token_ids, BLOCK_SIZE, salt, partial(bytes_of_spans, spans)))
    await fake.send_prefixes(hashes)
    await until(lambda: set(hashes) <= engines._router._cached[number])


async def test_prompts_without_a_prefix_go_to_the_engine_with_less_to_do(
    engines: Engines, fakes: list[FakeEngine]
) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(6):
            stack.enter_context(engines.submit(prompt([number] * 5)))
        await until(lambda: submitted(fakes) == [3, 3])
        stack.enter_context(engines.submit(prompt([7] * 500)))
        for number in range(3):
            stack.enter_context(engines.submit(prompt([8 + number] * 5)))
        await until(lambda: sorted(submitted(fakes)) == [4, 6])
        assert engines.open_streams == 10
    assert engines.open_streams == 0
    assert [engines.load.of_engine(number) for number in range(2)] == [WorkerLoad(0, 0)] * 2


async def test_samples_of_a_prompt_stay_together(engines: Engines, fakes: list[FakeEngine]) -> None:
    with engines.submit(prompt([1, 2], samples=5)):
        await until(lambda: sorted(submitted(fakes)) == [0, 5])


@pytest.mark.parametrize("number", [0, 1])
async def test_a_prompt_goes_where_its_prefix_is_cached_and_counts_for_what_is_not(
    engines: Engines, fakes: list[FakeEngine], number: int
) -> None:
    await knows(engines, number, fakes[number], PREFIX)
    with engines.submit(prompt([*PREFIX, 1, 2, 3])) as (stream,):
        await fakes[number].submissions(1)
        assert engines.load.of_engine(number) == WorkerLoad(1, 3)
        assert engines.load.own == WorkerLoad(1, len(PREFIX) + 3)
        await fakes[number].send(stream.sequence_id, [5])
        await anext(stream)
        assert engines.load.of_engine(number) == WorkerLoad(1, 0)
    assert submitted(fakes) == [1 - number, number]


async def test_what_has_left_the_index_attracts_no_prompt(engines: Engines, fakes: list[FakeEngine]) -> None:
    await knows(engines, 1, fakes[1], PREFIX)
    await fakes[1].send_prefixes([], list(block_hashes(PREFIX, BLOCK_SIZE)))
    await until(lambda: not engines._router._cached[1])
    with engines.submit(prompt(PREFIX)):
        await fakes[0].submissions(1)


async def test_prompts_that_take_nothing_from_the_cache_are_not_attracted(fakes: list[FakeEngine]) -> None:
    async with connected(fakes, prefix_caching=False) as engines:
        await until(lambda: all(engine.ready for engine in engines.engines))
        await knows(engines, 1, fakes[1], PREFIX)
        with engines.submit(prompt(PREFIX)):
            await fakes[0].submissions(1)
    async with connected(fakes) as engines:
        await until(lambda: all(engine.ready for engine in engines.engines))
        await knows(engines, 1, fakes[1], PREFIX)
        with engines.submit(prompt(PREFIX, prompt_logprobs=0)):
            await fakes[0].submissions(2)
        with engines.submit(prompt(PREFIX, cache_salt=b"of another key")) as (_,), engines.submit(prompt([1])):
            await until(lambda: submitted(fakes)[1] > 0)
            assert engines.load.of_engine(0).prompt_tokens + engines.load.of_engine(1).prompt_tokens == len(PREFIX) + 1


async def test_a_prompt_with_an_image_goes_where_that_image_is_cached(
    engines: Engines, fakes: list[FakeEngine]
) -> None:
    own, other = (PromptSpan(start=2 * BLOCK_SIZE + 1, length=3, content=content) for content in (b"cat", b"dog"))
    await knows(engines, 0, fakes[0], PREFIX, spans=[other])
    await knows(engines, 1, fakes[1], PREFIX, spans=[own])
    with engines.submit(prompt(PREFIX, spans=[own])):
        await fakes[1].submissions(1)
        assert engines.load.of_engine(1).prompt_tokens == BLOCK_SIZE  # the last block, with the last token


async def test_prompts_beyond_the_rope_limit_share_only_with_those_of_their_length(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        fakes = [
            await stack.enter_async_context(FakeEngine(address=f"ipc://{tmp_path}/{number}", rope_limit=100))
            for number in range(2)
        ]
        engines = await stack.enter_async_context(connected(fakes))
        await until(lambda: all(engine.ready for engine in engines.engines))
        await knows(engines, 1, fakes[1], PREFIX, salted_with_length(b"key", len(PREFIX)))
        with engines.submit(prompt(PREFIX, cache_salt=b"key")):
            await fakes[1].submissions(1)
            assert engines.load.of_engine(1).prompt_tokens == BLOCK_SIZE  # the last block, with the last token


async def test_an_engines_end_ends_its_own_streams_and_its_successor_joins(
    engines: Engines, fakes: list[FakeEngine]
) -> None:
    await knows(engines, 1, fakes[1], PREFIX)
    with engines.submit(prompt(PREFIX)) as (dies,), engines.submit(prompt([1])) as (lives,):
        await until(lambda: submitted(fakes) == [1, 1])
        await fakes[1].die()
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(EngineDeadError):
                await anext(dies)
        assert engines.ready
        assert engines.load.of_engine(1) == WorkerLoad(0, 0)
        assert engines._router._cached[1] == set()
        with engines.submit(prompt(PREFIX)) as (other,):
            await fakes[0].submissions(2)
            for stream in (lives, other):
                await fakes[0].send(stream.sequence_id, [5], "length")
                assert (await anext(stream)).token_ids == [5]
    async with FakeEngine(address=fakes[1].address) as successor:
        await until(lambda: engines.engines[1].ready)
        with engines.submit(prompt([2])), engines.submit(prompt([3])):
            await successor.submissions(1)


async def test_while_no_engine_serves_nothing_is_submitted(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        fakes = [
            await stack.enter_async_context(FakeEngine(address=f"ipc://{tmp_path}/{number}", ready=False))
            for number in range(2)
        ]
        engines = await stack.enter_async_context(connected(fakes))
        await until(lambda: all(fake.workers for fake in fakes))
        with pytest.raises(EngineNotReadyError), engines.submit(prompt([1])):
            pass
        await fakes[1].become_ready()
        async with asyncio.timeout(PATIENCE):
            await engines.wait_until_ready()
        assert [engine.ready for engine in engines.engines] == [False, True]
        with engines.submit(prompt([1])), engines.submit(prompt([2])):
            await fakes[1].submissions(2)
        for fake in fakes:
            await fake.die()
        await until(lambda: all(engine.dead for engine in engines.engines))
        assert not engines.ready
        with pytest.raises(EngineDeadError), engines.submit(prompt([1])):
            pass
