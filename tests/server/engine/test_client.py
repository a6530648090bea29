"""The asyncio side of the engine: streams get their own tokens, end once, and never wait for a dead engine."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest
import zmq
import zmq.asyncio

from persimmon.model.sampling_params import SamplingParams
from persimmon.model.token_logprobs import TokenLogprobs
from persimmon.server.engine.client import (
    WARM_UP_ID,
    EngineClient,
    EngineDeadError,
    EngineNotReadyError,
    SequenceStream,
)
from persimmon.server.engine.messages import (
    Ready,
    SequenceOutput,
    StepOutput,
    Submit,
    ToEngine,
)
from persimmon.server.vitals import WorkerLoad
from tests.server.http.fake_engine import MAX_MODEL_LEN, STATS, FakeEngine, outputs, says

pytestmark = pytest.mark.anyio

PATIENCE = 20.0
SAMPLING = SamplingParams(temperature=0.5, seed=3)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextlib.asynccontextmanager
async def connected(engine: FakeEngine) -> AsyncIterator[EngineClient]:
    client = EngineClient(engine.address)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


@pytest.fixture
async def engine(anyio_backend: str) -> AsyncIterator[FakeEngine]:
    async with FakeEngine() as engine:
        yield engine


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[EngineClient]:
    async with connected(engine) as client:
        async with asyncio.timeout(PATIENCE):
            await client.wait_until_ready()
        yield client


async def read(stream: SequenceStream) -> SequenceOutput:
    async with asyncio.timeout(PATIENCE):
        return await anext(stream)


async def read_all(stream: SequenceStream) -> SequenceOutput:
    """Everything that comes until the end, as one output."""
    tokens: list[int] = []
    while True:
        output = await read(stream)
        tokens += output.token_ids
        if stream.finished:
            return msgspec.structs.replace(output, token_ids=tokens)


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not happened():  # noqa: ASYNC110 - the client has no event for it
            await asyncio.sleep(0.002)


async def news_has_come(engine: FakeEngine, client: EngineClient) -> None:
    """Returns once the client has taken all that the engine has sent so far."""
    with client.submit(Submit(token_ids=[0], max_tokens=2, sampling=SAMPLING)) as (stream,):
        await engine.until(lambda engine: stream.sequence_id in [submit.sequence_id for submit in engine.submitted])
        await engine.send(stream.sequence_id, [0], "length")
        await read(stream)


async def test_work_that_cannot_be_sent_leaves_no_stream_behind(client: EngineClient) -> None:
    with (
        pytest.raises(OverflowError),
        client.submit(Submit(token_ids=[5], max_tokens=2**70, sampling=SAMPLING)),
    ):
        pass
    assert client.open_streams == 0


async def test_nothing_is_submitted_while_the_model_loads() -> None:
    async with FakeEngine(ready=False) as engine, connected(engine) as client:
        await engine.until(lambda engine: len(engine.workers) == 1)
        assert client.info is None
        with (
            pytest.raises(EngineNotReadyError),
            client.submit(Submit(token_ids=[1], max_tokens=1, sampling=SAMPLING)),
        ):
            pass
        await engine.become_ready()
        async with asyncio.timeout(PATIENCE):
            await client.wait_until_ready()
        assert client.ready
        assert client.open_streams == 0
        assert engine.submitted == []


async def test_the_engines_limits_and_state_are_known_when_it_is_ready(client: EngineClient) -> None:
    assert client.info is not None
    assert client.info.max_model_len == MAX_MODEL_LEN
    assert client.stats == STATS


async def test_a_submission_carries_all_that_was_asked_for(client: EngineClient, engine: FakeEngine) -> None:
    wanted = Submit(token_ids=[5, 6], max_tokens=9, stop_token_ids=[7, 8], sampling=SAMPLING)
    with client.submit(wanted) as (stream,):
        (submit,) = await engine.submissions(1)
        assert submit.whole == msgspec.structs.replace(wanted, sequence_id=stream.sequence_id)


async def test_samples_of_a_prompt_are_one_submission_and_end_one_by_one(
    client: EngineClient, engine: FakeEngine
) -> None:
    wanted = Submit(token_ids=[5, 6], max_tokens=9, sampling=SAMPLING, samples=3, prompt_logprobs=2, pooling="all")
    with client.submit(wanted) as streams:
        submits = await engine.submissions(3)
        ids = [stream.sequence_id for stream in streams]
        assert all(submit.whole == msgspec.structs.replace(wanted, sequence_id=ids[0]) for submit in submits)
        await engine.send(ids[0], [4], "stop")
        assert (await read_all(streams[0])).token_ids == [4]
        streams[1].close()
        assert await engine.aborts(1) == [ids[1]]
    assert await engine.aborts(2) == ids[1:]
    assert client.open_streams == 0


async def test_what_arrived_together_comes_together(client: EngineClient, engine: FakeEngine) -> None:
    entries = [TokenLogprobs(token_id=token, logprob=-1.5, top_ids=[7], top_logprobs=[-0.5]) for token in range(4)]
    with client.submit(Submit(token_ids=[5, 6], max_tokens=9, sampling=SAMPLING)) as (stream,):
        await engine.submissions(1)
        news = [
            SequenceOutput(stream.sequence_id, [], prompt_logprobs=entries[:1], pooled=b"ab"),
            SequenceOutput(stream.sequence_id, [2], logprobs=entries[2:3], prompt_logprobs=entries[1:2], pooled=b"cd"),
            SequenceOutput(stream.sequence_id, [3], "length", logprobs=entries[3:]),
        ]
        await engine._send(engine.workers[0], StepOutput(news, STATS))
        output = await read(stream)
    assert (output.token_ids, output.finish_reason, output.pooled) == ([2, 3], "length", b"abcd")
    assert (output.prompt_logprobs, output.logprobs) == (entries[:2], entries[2:])


async def test_a_stream_yields_its_tokens_and_ends(client: EngineClient, engine: FakeEngine) -> None:
    with client.submit(Submit(token_ids=[1], max_tokens=9, sampling=SAMPLING)) as (stream,):
        await engine.submissions(1)
        for token, reason in ((4, None), (5, None), (6, "stop")):
            await engine.send(stream.sequence_id, [token], reason)
            output = await read(stream)
            assert (output.token_ids, output.finish_reason) == ([token], reason)
        assert stream.finished
        assert [output async for output in stream] == []
    assert client.open_streams == 0


async def test_concurrent_streams_get_their_own_tokens(client: EngineClient, engine: FakeEngine) -> None:
    engine.script = lambda submit: outputs(submit.sequence_id, [[token] for token in submit.token_ids])

    async def generate(prompt: list[int]) -> list[int]:
        with client.submit(Submit(token_ids=prompt, max_tokens=3, sampling=SAMPLING)) as (stream,):
            return (await read_all(stream)).token_ids

    prompts = [[i, i + 1, 2 * i] for i in range(50)]
    assert await asyncio.gather(*map(generate, prompts)) == prompts
    assert engine.aborted == []


async def test_the_engines_error_reaches_the_reader(client: EngineClient, engine: FakeEngine) -> None:
    with client.submit(Submit(token_ids=[1], max_tokens=9, sampling=SAMPLING)) as (stream,):
        await engine.submissions(1)
        await engine.send_output(SequenceOutput(stream.sequence_id, [], "error", error="it is too long"))
        output = await read(stream)
    assert (output.finish_reason, output.error) == ("error", "it is too long")
    assert stream.finished


async def test_leaving_early_aborts_once(client: EngineClient, engine: FakeEngine) -> None:
    with client.submit(Submit(token_ids=[1], max_tokens=9, sampling=SAMPLING)) as (stream,):
        await engine.submissions(1)
        await engine.send(stream.sequence_id, [4])
        await read(stream)
    assert client.open_streams == 0
    assert await engine.aborts(1) == [stream.sequence_id]
    await news_has_come(engine, client)
    assert engine.aborted == [stream.sequence_id]


async def test_leaving_before_anything_has_come_aborts(client: EngineClient, engine: FakeEngine) -> None:
    with client.submit(Submit(token_ids=[1], max_tokens=9, sampling=SAMPLING)) as (stream,):
        pass
    assert await engine.aborts(1) == [stream.sequence_id]


async def test_a_cancelled_reader_aborts(client: EngineClient, engine: FakeEngine) -> None:
    async def generate() -> None:
        with client.submit(Submit(token_ids=[1], max_tokens=9, sampling=SAMPLING)) as (stream,):
            await read_all(stream)

    reader = asyncio.create_task(generate())
    (submit,) = await engine.submissions(1)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert await engine.aborts(1) == [submit.sequence_id]


async def test_nothing_is_aborted_after_the_end(client: EngineClient, engine: FakeEngine) -> None:
    engine.script = says([3, 4])
    with client.submit(Submit(token_ids=[1], max_tokens=2, sampling=SAMPLING)) as (stream,):
        await read_all(stream)
    engine.script = lambda submit: []
    await news_has_come(engine, client)
    assert engine.aborted == []


async def test_nothing_is_aborted_when_the_end_came_unread(client: EngineClient, engine: FakeEngine) -> None:
    with client.submit(Submit(token_ids=[1], max_tokens=2, sampling=SAMPLING)) as (stream,):
        await engine.submissions(1)
        await engine.send(stream.sequence_id, [4], "stop")
        await news_has_come(engine, client)
    await news_has_come(engine, client)
    assert engine.aborted == []


async def test_outputs_for_sequences_that_were_left_or_never_were_are_ignored(
    client: EngineClient, engine: FakeEngine
) -> None:
    with client.submit(Submit(token_ids=[1], max_tokens=9, sampling=SAMPLING)) as (left,):
        await engine.submissions(1)
    with client.submit(Submit(token_ids=[2], max_tokens=9, sampling=SAMPLING)) as (stream,):
        await engine.submissions(2)
        others = [
            SequenceOutput(left.sequence_id, [7], "stop"),
            SequenceOutput(999, [8]),
            SequenceOutput(998, [], "stop"),
        ]
        own = SequenceOutput(stream.sequence_id, [9], "stop")
        await engine._send(engine.workers[0], StepOutput([*others, own], STATS))
        assert (await read_all(stream)).token_ids == [9]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await anext(left)


async def test_outputs_of_a_large_step_all_come_in_order_though_the_engine_dies(
    client: EngineClient, engine: FakeEngine
) -> None:
    with client.submit(Submit(token_ids=[1], max_tokens=9, sampling=SAMPLING, samples=300)) as streams:
        await engine.submissions(300)
        await engine.send_step([SequenceOutput(stream.sequence_id, [4]) for stream in streams])
        await engine.send_step([SequenceOutput(stream.sequence_id, [5], "length") for stream in streams[:-1]])
        await until(lambda: streams[0].sequence_id not in client._streams)
        await engine.die()
        ended = [(await read_all(stream)).token_ids for stream in streams[:-1]]
        assert ended == [[4, 5]] * 299
        assert (await read(streams[-1])).token_ids == [4]
        with pytest.raises(EngineDeadError):
            await read(streams[-1])


async def test_open_streams_end_when_the_engine_dies(client: EngineClient, engine: FakeEngine) -> None:
    with (
        client.submit(Submit(token_ids=[1], max_tokens=9, sampling=SAMPLING)) as (one,),
        client.submit(Submit(token_ids=[1], max_tokens=9, sampling=SAMPLING)) as (other,),
    ):
        await engine.submissions(2)
        waiting = asyncio.create_task(read(one))
        await engine.send(other.sequence_id, [4])
        assert (await read(other)).token_ids == [4]
        await engine.die()
        for reader in (waiting, read(other), read(other)):
            with pytest.raises(EngineDeadError):
                await reader
    assert client.dead
    assert not client.ready
    assert client.open_streams == 0


async def test_nothing_is_submitted_to_a_dead_engine(client: EngineClient, engine: FakeEngine) -> None:
    await engine.die()
    await until(lambda: client.dead)
    with (
        pytest.raises(EngineDeadError),
        client.submit(Submit(token_ids=[1], max_tokens=1, sampling=SAMPLING)),
    ):
        pass


async def test_an_engine_that_dies_while_it_loads_is_dead() -> None:
    async with FakeEngine(ready=False) as engine, connected(engine) as client:
        await engine.until(lambda engine: len(engine.workers) == 1)
        await engine.die()
        await until(lambda: client.dead)
        with (
            pytest.raises(EngineDeadError),
            client.submit(Submit(token_ids=[1], max_tokens=1, sampling=SAMPLING)),
        ):
            pass


@pytest.mark.parametrize("garbage", [b"", b"\xffnoise", b"\x92\xa5rea\x93y\x91\x01"])
async def test_streams_end_when_the_engine_cannot_be_understood(
    client: EngineClient, engine: FakeEngine, garbage: bytes
) -> None:
    with client.submit(Submit(token_ids=[1], max_tokens=9, sampling=SAMPLING)) as (stream,):
        await engine.submissions(1)
        await engine._socket.send_multipart([engine.workers[0], garbage])
        with pytest.raises(EngineDeadError, match="cannot be read"):
            await read(stream)
    # It begins anew, as another worker would, and the engine drops what it had of the one that has gone.
    await until(lambda: client.ready)
    assert len(engine.workers) == 2


async def test_an_engine_is_ready_when_it_has_done_its_warm_up() -> None:
    address = "tcp://127.0.0.1:*"
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.bind(address)
        client = EngineClient(socket.getsockopt(zmq.LAST_ENDPOINT).decode())  # type: ignore[union-attr]
        await client.start()
        async with asyncio.timeout(PATIENCE):
            worker, _ = await socket.recv_multipart()
            ready = Ready(99, block_size=32, total_blocks=9, device="cpu", dtype="float32", stats=STATS)
            await socket.send_multipart([worker, msgspec.msgpack.encode(ready)])
            _, message = await socket.recv_multipart()
        submit = msgspec.msgpack.decode(message, type=ToEngine)
        assert isinstance(submit, Submit)
        assert (submit.sequence_id, submit.samples, submit.max_tokens) == (WARM_UP_ID, 1, 1)
        assert not client.ready
        with pytest.raises(EngineNotReadyError), client.submit(Submit(token_ids=[1], max_tokens=1)):
            pass
        output = SequenceOutput(WARM_UP_ID, [5], "length")
        await socket.send_multipart([worker, msgspec.msgpack.encode(StepOutput([output], STATS))])
        async with asyncio.timeout(PATIENCE):
            await client.wait_until_ready()
        assert client.open_streams == 0
        with client.submit(Submit(token_ids=[1], max_tokens=1)):
            pass
        await client.close()


async def test_the_next_engine_serves_when_one_has_died(engine: FakeEngine) -> None:
    async with connected(engine) as client:
        await until(lambda: client.ready)
        with client.submit(Submit(token_ids=[1, 2, 3], max_tokens=9, sampling=SAMPLING, samples=2)) as streams:
            await engine.submissions(2)
            await engine.die()
            for stream in streams:
                with pytest.raises(EngineDeadError):
                    await read(stream)
            assert client.load.own == WorkerLoad(0, 0)
        async with FakeEngine(says([4]), address=engine.address) as successor:
            await until(lambda: client.ready)
            with client.submit(Submit(token_ids=[8], max_tokens=1, sampling=SAMPLING)) as (stream,):
                assert (await read_all(stream)).token_ids == [4]
            # Nothing that was meant for the one has reached the other.
            assert [submit.token_ids for submit in successor.submitted] == [[8]]
            assert successor.aborted == []


async def test_what_is_wanted_of_the_engine_is_counted(client: EngineClient, engine: FakeEngine) -> None:
    with (
        client.submit(Submit(token_ids=[5, 6, 7], max_tokens=9, samples=2)),
        client.submit(Submit(token_ids=[5], max_tokens=9)) as (other,),
    ):
        first, _, _ = await engine.submissions(3)
        assert client.load.own == WorkerLoad(3, 4)
        await engine.send(first.sequence_id, [4])
        await engine.send(other.sequence_id, [4], "length")
        await read_all(other)
        assert client.load.own == WorkerLoad(2, 0)
    assert client.load.own == WorkerLoad(0, 0)


async def test_a_prompt_that_is_never_read_counts_until_it_is_aborted(client: EngineClient) -> None:
    with client.submit(Submit(token_ids=[5, 6], max_tokens=9)) as (stream,):
        stream.close()
        assert client.load.own == WorkerLoad(0, 0)


async def test_a_reader_that_never_comes_keeps_few_objects() -> None:
    stream = SequenceStream(1, lambda sequence_id: None)
    for token in range(10_000):
        stream.put(SequenceOutput(1, [token]))
    assert len(stream._arrived) < 1100
    assert (await read(stream)).token_ids == list(range(10_000))


async def test_closing_ends_open_streams(engine: FakeEngine) -> None:
    client = EngineClient(engine.address)
    await client.start()
    async with asyncio.timeout(PATIENCE):
        await client.wait_until_ready()
    with client.submit(Submit(token_ids=[1], max_tokens=9, sampling=SAMPLING)) as (stream,):
        await engine.submissions(1)
        waiting = asyncio.create_task(read(stream))
        await asyncio.sleep(0)
        await client.close()
        with pytest.raises(EngineDeadError, match="shutting down"):
            await waiting
    assert client.open_streams == 0
    with (
        pytest.raises(EngineDeadError),
        client.submit(Submit(token_ids=[1], max_tokens=1, sampling=SAMPLING)),
    ):
        pass


async def test_outputs_that_come_while_the_reader_is_busy_are_merged() -> None:
    stream = SequenceStream(1, lambda sequence_id: None)
    stream.put(SequenceOutput(1, [4], cached_tokens=2))
    stream.put(SequenceOutput(1, [5, 6], cached_tokens=2))
    assert await read(stream) == SequenceOutput(1, [4, 5, 6], None, cached_tokens=2)
    assert not stream.finished
    stream.put(SequenceOutput(1, [7], cached_tokens=2))
    stream.put(SequenceOutput(1, [], "error", cached_tokens=2, error="the model failed"))
    assert await read(stream) == SequenceOutput(1, [7], "error", cached_tokens=2, error="the model failed")
    assert stream.finished


async def test_what_comes_in_a_pause_is_read_after_it_and_the_end_at_once() -> None:
    pauses = iter((0.001, 60.0))
    stream = SequenceStream(1, lambda sequence_id: None, pause=lambda: next(pauses))
    stream.put(SequenceOutput(1, [4]))
    assert (await read(stream)).token_ids == [4]
    stream.put(SequenceOutput(1, [5]))
    stream.put(SequenceOutput(1, [6]))
    assert (await read(stream)).token_ids == [5, 6]
    stream.put(SequenceOutput(1, [7]))
    reading = asyncio.create_task(read(stream))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not reading.done()
    stream.put(SequenceOutput(1, [8], "length"))
    assert (await reading).token_ids == [7, 8]


async def test_the_end_of_the_engine_does_not_wait_for_a_pause() -> None:
    stream = SequenceStream(1, lambda sequence_id: None, pause=lambda: 60.0)
    stream.put(SequenceOutput(1, [4]))
    assert (await read(stream)).token_ids == [4]
    stream.put(SequenceOutput(1, [5]))
    stream.fail(EngineDeadError("the engine process has ended"))
    assert (await read(stream)).token_ids == [5]
    with pytest.raises(EngineDeadError):
        await read(stream)


async def test_streams_pause_the_longer_the_more_sequences_run(engine: FakeEngine) -> None:
    client = EngineClient(engine.address, max_chunks_per_second=STATS.running / 60)
    await client.start()
    async with asyncio.timeout(PATIENCE):
        await client.wait_until_ready()
    with client.submit(Submit(token_ids=[1], max_tokens=9, samples=2)) as (stream, other):
        await engine.submissions(2)
        await engine.send(stream.sequence_id, [4])
        assert (await read(stream)).token_ids == [4]
        reading = asyncio.create_task(read(stream))
        await engine.send(stream.sequence_id, [5])
        await engine.send(other.sequence_id, [7])
        assert (await read(other)).token_ids == [7]  # so what was sent before has come
        await engine.send(stream.sequence_id, [6], "length")
        assert (await reading).token_ids == [5, 6]
    await client.close()


async def test_what_came_before_the_engine_died_is_read_first() -> None:
    stream = SequenceStream(1, lambda sequence_id: None)
    stream.put(SequenceOutput(1, [4]))
    stream.fail(EngineDeadError("the engine process has ended"))
    assert (await read(stream)).token_ids == [4]
    with pytest.raises(EngineDeadError):
        await read(stream)


async def test_a_stream_that_ended_before_the_engine_died_has_ended() -> None:
    stream = SequenceStream(1, lambda sequence_id: None)
    stream.put(SequenceOutput(1, [4], "length"))
    stream.fail(EngineDeadError("the engine process has ended"))
    assert [output.token_ids async for output in stream] == [[4]]


async def test_an_output_does_not_wait_behind_all_of_another_client(client: EngineClient, engine: FakeEngine) -> None:
    with (
        client.submit(Submit(token_ids=[1], max_tokens=1, sampling=SAMPLING, samples=500, owner="many")) as many,
        client.submit(Submit(token_ids=[2], max_tokens=1, sampling=SAMPLING, owner="few")) as (own,),
    ):
        await engine.submissions(501)
        last = [SequenceOutput(stream.sequence_id, [7], "length") for stream in (*many, own)]
        await engine.send_step(last)
        await read(own)
        assert client.open_streams > 400
        for stream in many:
            await read(stream)
