"""Who is let in: work within the bounds, before it is tokenized, and nothing new while the server stops."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from persimmon.model.config import PersimmonConfig
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.config import Settings
from persimmon.server.engine.client import EngineClient
from persimmon.server.engine.load import Load
from persimmon.server.engine.messages import SequenceOutput, Submit
from persimmon.server.http.app import create_app
from persimmon.server.http.errors import ApiError
from persimmon.server.http.middleware.gate import MAX_RETRY_SECONDS, STEPS_QUEUED, Gate, Limits
from persimmon.server.vitals import Vitals, WorkerLoad
from tests.server.http.conftest import DEMO
from tests.server.http.fake_engine import FakeEngine, says

pytestmark = pytest.mark.anyio

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
Tokens = Callable[[str], list[int]]


class CountingTokenizer(Tokenizer):
    """A tokenizer that must not be asked."""

    encoded = 0

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        self.encoded += 1
        return super().encode(text, add_bos)


@pytest.fixture
def vitals() -> Vitals:
    return Vitals.private(2)


@contextlib.asynccontextmanager
async def gated(
    engine: FakeEngine, tokenizer: Tokenizer, config: PersimmonConfig, limits: Limits, vitals: Vitals
) -> AsyncIterator[tuple[httpx.AsyncClient, Gate]]:
    """A client of an app with a gate, the first of two workers."""
    gate = Gate(Load(vitals, 0), limits)
    client = EngineClient(engine.address, load=gate.load)
    await client.start()
    async with asyncio.timeout(20):
        await client.wait_until_ready()
    app = create_app(client, tokenizer, config, "demo", gate=gate)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
        yield http, gate
    await client.close()


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not happened():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0)


def error_of(response: httpx.Response, code: str) -> str:
    """The message of a refusal, whose shape is OpenAI's."""
    assert response.status_code == 429, response.text
    seconds = response.headers["retry-after"]
    assert 1 <= int(seconds) <= MAX_RETRY_SECONDS
    error = response.json()["error"]
    assert (error["code"], error["type"], error["param"]) == (code, "server_error", None)
    return str(error["message"])


@pytest.mark.parametrize("stream", [False, True])
async def test_what_comes_to_a_full_server_is_refused_before_it_is_read(
    engine: FakeEngine, config: PersimmonConfig, tokenizer: Tokenizer, vitals: Vitals, stream: bool
) -> None:
    async with gated(engine, tokenizer, config, Limits(sequences=3), vitals) as (http, _):
        async with asyncio.TaskGroup() as tasks:
            inside = [tasks.create_task(http.post(COMPLETIONS, json={"prompt": "a", "n": n})) for n in (1, 2)]
            submits = await engine.submissions(3)
            # Not JSON at all, and yet the error states the server's condition.
            refused = await http.post(COMPLETIONS, content=b"{")
            assert "it has 3 of at most 3 sequences" in error_of(refused, "overloaded")
            error_of(await http.post(CHAT, json={"messages": [], "stream": stream}), "overloaded")
            error_of(await http.post("/v1/embeddings", json={"input": "a"}), "overloaded")
            assert (await http.post("/tokenize", json={"prompt": "a"})).status_code == 200
            assert (await http.get("/health")).status_code == 200
            for submit in submits:
                await engine.send(submit.sequence_id, [5], "length")
        assert [task.result().status_code for task in inside] == [200, 200]
        engine.script = says([5])
        assert (await http.post(COMPLETIONS, json={"prompt": "a"})).status_code == 200
        metrics = (await http.get("/metrics")).text
        assert f'persimmon_http_requests_total{{endpoint="{COMPLETIONS}",status="429"}} 1.0' in metrics


async def test_every_sample_counts_and_a_request_that_is_too_large_for_the_rest_is_not_tokenized(
    engine: FakeEngine, config: PersimmonConfig, tokenizer: Tokenizer, vitals: Vitals
) -> None:
    tokenizer = CountingTokenizer.from_folder(DEMO)
    assert isinstance(tokenizer, CountingTokenizer)
    async with gated(engine, tokenizer, config, Limits(sequences=4), vitals) as (http, gate):
        async with asyncio.TaskGroup() as tasks:
            # Alone, it may be as large as it likes.
            first = tasks.create_task(http.post(COMPLETIONS, json={"prompt": "a", "n": 9}))
            submits = await engine.submissions(9)
            error_of(await http.post(COMPLETIONS, json={"prompt": "b"}), "overloaded")
            for submit in submits[:7]:
                await engine.send(submit.sequence_id, [5], "length")
            await until(lambda: gate.load.own.sequences == 2)
            encoded = tokenizer.encoded
            refused = await http.post(COMPLETIONS, json={"prompt": ["a", "b", "c"]})
            assert "this request asks for 3" in error_of(refused, "overloaded")
            assert tokenizer.encoded == encoded
            second = tasks.create_task(http.post(COMPLETIONS, json={"prompt": "a", "n": 2}))
            submits += (await engine.submissions(11))[9:]
            for submit in submits[7:]:
                await engine.send(submit.sequence_id, [5], "length")
        assert first.result().status_code == second.result().status_code == 200


async def test_prompt_tokens_count_until_they_are_computed(
    engine: FakeEngine, config: PersimmonConfig, tokenizer: Tokenizer, vitals: Vitals
) -> None:
    async with gated(engine, tokenizer, config, Limits(prompt_tokens=100), vitals) as (http, gate):
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(http.post(COMPLETIONS, json={"prompt": [5] * 60, "n": 2}))
            first, second = await engine.submissions(2)
            assert gate.load.total == WorkerLoad(2, 60)
            refused = await http.post(COMPLETIONS, json={"prompt": [5] * 41})
            assert "60 prompt tokens of at most 100" in error_of(refused, "overloaded")
            error_of(await http.post(COMPLETIONS, json={"prompt": "word " * 40}), "overloaded")
            error_of(await http.post("/v1/embeddings", json={"input": [[5] * 30, [5] * 30]}), "overloaded")
            error_of(await http.put("/api", json={"prompts": ["word " * 40], "tokens_to_generate": 2}), "overloaded")
            await engine.send(first.sequence_id, [5])
            await until(lambda: gate.load.own.prompt_tokens == 0)
            other = tasks.create_task(http.post(COMPLETIONS, json={"prompt": [5] * 99}))
            last = (await engine.submissions(3))[2]
            for submit in (first, second, last):
                await engine.send(submit.sequence_id, [5], "length")
        assert asking.result().status_code == other.result().status_code == 200


async def test_the_bound_is_that_of_all_workers_together(
    engine: FakeEngine, config: PersimmonConfig, tokenizer: Tokenizer, vitals: Vitals
) -> None:
    engine.script = says([5])
    async with gated(engine, tokenizer, config, Limits(sequences=5), vitals) as (http, _):
        vitals.tell(1, WorkerLoad(5, 0))
        error_of(await http.post(COMPLETIONS, json={"prompt": "a"}), "overloaded")
        vitals.tell(1, WorkerLoad(4, 0))
        assert (await http.post(COMPLETIONS, json={"prompt": "a"})).status_code == 200


async def test_what_is_being_tokenized_has_its_place_already(vitals: Vitals) -> None:
    gate = Gate(Load(vitals, 0), Limits(sequences=3, prompt_tokens=50))
    with gate.reserved(2, 40):
        assert vitals.load == WorkerLoad(2, 40)
        with pytest.raises(Exception, match="full"), gate.reserved(2, 0):
            pass
        with pytest.raises(Exception, match="full"), gate.reserved(1, 11):
            pass
        assert vitals.load == WorkerLoad(2, 40)
    assert vitals.load == WorkerLoad(0, 0)


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/embeddings"])
async def test_what_has_waited_too_long_is_a_429(http: httpx.AsyncClient, engine: FakeEngine, path: str) -> None:
    engine.script = lambda sample: [SequenceOutput(sample.sequence_id, [], "expired", error="It has waited.")]
    body = {"prompt": "a"} if path == COMPLETIONS else {"input": "a"}
    assert error_of(await http.post(path, json=body), "queue_timeout") == "It has waited."
    if path == COMPLETIONS:
        assert error_of(await http.post(path, json=body | {"stream": True}), "queue_timeout") == "It has waited."


async def test_while_the_server_stops_new_work_is_sent_away_and_the_rest_goes_on(
    engine: FakeEngine, config: PersimmonConfig, tokenizer: Tokenizer, vitals: Vitals
) -> None:
    async with gated(engine, tokenizer, config, Limits(), vitals) as (http, gate):
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(http.post(COMPLETIONS, json={"prompt": "a"}))
            [submit] = await engine.submissions(1)
            gate.draining = True
            empty = tasks.create_task(gate.wait_until_empty())
            for path in (COMPLETIONS, "/tokenize"):
                refused = await http.post(path, json={"prompt": "a"})
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "shutting_down"
                assert int(refused.headers["retry-after"]) > 0
                assert refused.headers["connection"] == "close"
            for path in ("/health", "/readyz"):
                probed = await http.get(path)
                assert (probed.status_code, probed.json()["status"]) == (503, "draining")
            alive = await http.get("/livez")
            assert (alive.status_code, alive.headers["connection"]) == (200, "close")
            assert not empty.done()
            await engine.send(submit.sequence_id, [5], "length")
        assert asking.result().status_code == 200
        assert asking.result().headers["connection"] == "close"


async def test_health_is_false_when_the_engine_hangs_and_true_when_it_is_busy(
    engine: FakeEngine, config: PersimmonConfig, tokenizer: Tokenizer
) -> None:
    now = [10**12]
    vitals = Vitals.private(1, lambda: now[0])
    async with gated(engine, tokenizer, config, Limits(step_timeout=30), vitals) as (http, _):
        now[0] += 3600 * 10**9  # idle for an hour
        assert (await http.get("/health")).status_code == 200
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(http.post(COMPLETIONS, json={"prompt": "a"}))
            [submit] = await engine.submissions(1)
            for _ in range(100):  # a long prompt: every step ends in time, and no token comes
                now[0] += 29 * 10**9
                vitals.beat(True)
                assert (await http.get("/health")).status_code == 200
            now[0] += 31 * 10**9
            for path in ("/health", "/readyz", "/healthz"):
                assert (await http.get(path)).status_code == 503
            assert (await http.get("/health")).json() == {
                "status": "hung",
                "reason": "the engine has work but has not finished a step for 31 s",
            }
            assert (await http.get("/livez")).status_code == 200
            vitals.beat(True)
            assert (await http.get("/health")).status_code == 200
            assert len(engine.submitted) == 1  # the probes have asked for nothing
            await engine.send(submit.sequence_id, [5], "length")


def test_the_bounds_follow_from_what_the_engines_do_at_once() -> None:
    limits = Limits.of(Settings(max_num_seqs=10, max_num_batched_tokens=100))
    assert (limits.sequences, limits.prompt_tokens) == (50, 25_600)
    limits = Limits.of(Settings(max_num_seqs=10, max_num_batched_tokens=100, data_parallel_size=3))
    assert (limits.sequences, limits.prompt_tokens) == (150, 76_800)
    limits = Limits.of(Settings(max_num_queued_reqs=7, max_num_queued_tokens=8))
    assert (limits.sequences, limits.prompt_tokens) == (7, 8)


def test_a_server_that_others_have_filled_has_room_for_a_key_that_has_little() -> None:
    gate = Gate(Load(), Limits(sequences=16, prompt_tokens=2560), clients=lambda: 2)
    with gate.reserved(40, 4000, "hog"):
        with pytest.raises(ApiError, match="has 40 of at most 16 sequences"):
            gate.check(1, 0, "hog")
        with pytest.raises(ApiError, match="full"):
            gate.check(1, 0)
        with gate.reserved(3, 600, "newcomer"):
            gate.check(1, 40, "newcomer")
            with pytest.raises(ApiError, match="asks for 2"):
                gate.check(2, 0, "newcomer")
            with pytest.raises(ApiError, match="adds about 41"):
                gate.check(1, 41, "newcomer")
        gate.check(4, 640, "newcomer")


def test_of_many_keys_each_has_room_for_one_sequence_and_a_steps_tokens() -> None:
    gate = Gate(Load(), Limits(sequences=16, prompt_tokens=STEPS_QUEUED * 8), clients=lambda: 1000)
    with gate.reserved(40, STEPS_QUEUED * 8, "hog"):
        gate.check(1, 8, "newcomer")
        with pytest.raises(ApiError, match="asks for 2"):
            gate.check(2, 8, "newcomer")
        with pytest.raises(ApiError, match="adds about 9"):
            gate.check(1, 9, "newcomer")


async def test_what_a_key_has_in_the_server_ends_with_its_requests(
    engine: FakeEngine, config: PersimmonConfig, tokenizer: Tokenizer, vitals: Vitals
) -> None:
    async with gated(engine, tokenizer, config, Limits(), vitals) as (_, gate):
        client = EngineClient(engine.address, load=gate.load)
        await client.start()
        async with asyncio.timeout(20):
            await client.wait_until_ready()
        with client.submit(Submit(token_ids=[1, 2, 3], max_tokens=4, samples=2, owner="alice")):
            assert gate.load.of("alice") == WorkerLoad(2, 3)
            assert gate.load.of("bob") == WorkerLoad(0, 0)
            first, _ = await engine.submissions(2)
            await engine.send(first.sequence_id, [5], "length")
            await until(lambda: gate.load.of("alice") == WorkerLoad(1, 0))
        assert gate.load.of("alice") == WorkerLoad(0, 0)
        with client.submit(Submit(token_ids=[1], max_tokens=4, owner="alice")):
            await client.close()
            assert gate.load.of("alice") == WorkerLoad(0, 0)
