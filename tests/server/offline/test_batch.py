"""A batch on the real application and a scripted engine."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from persimmon.model.config import PersimmonConfig
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.client import EngineClient
from persimmon.server.http.app import create_app
from persimmon.server.offline.batch import Batch, EngineLostError
from persimmon.server.offline.batch_lines import URLS
from persimmon.server.offline.files import BatchInput, BatchOutput
from tests.server.http.fake_engine import FakeEngine, says
from tests.server.offline.batch import completion, read_answers, texts, write_lines

pytestmark = pytest.mark.anyio

Tokens = Callable[[str], list[int]]
MakeBatch = Callable[..., Batch]


class Count:
    """Progress that adds up."""

    def __init__(self) -> None:
        self.lines = 0
        self.tokens = 0

    def advance(self, tokens: int) -> None:
        self.lines += 1
        self.tokens += tokens


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def batch(
    engine_client: EngineClient,
    tokenizer: Tokenizer,
    config: PersimmonConfig,
    tmp_path: Path,
    out: Path,
) -> MakeBatch:
    """Makes the batch of some lines."""

    def make(lines: Sequence[dict[str, Any] | str], any_model: bool = False) -> Batch:
        app = create_app(engine_client, tokenizer, config, "demo")
        source = BatchInput(write_lines(tmp_path / "in.jsonl", lines))
        return Batch(app=app, source=source, output=BatchOutput(out), progress=Count(), any_model=any_model)

    return make


async def run(batch: Batch, concurrency: int = 4) -> Count:
    with batch.output:
        await batch.run(concurrency)
    assert isinstance(batch.progress, Count)
    return batch.progress


async def test_every_line_is_answered_in_openais_form(
    batch: MakeBatch,
    engine: FakeEngine,
    tokens: Tokens,
    out: Path,
) -> None:
    engine.script = says(tokens("yes"))
    count = await run(batch([completion(str(index)) for index in range(20)]))
    answers = read_answers(out)
    assert texts(answers) == {str(index): " yes" for index in range(20)}
    assert count.lines == 20
    assert count.tokens == sum(answer["response"]["body"]["usage"]["total_tokens"] for answer in answers)
    first = answers[0]
    assert list(first) == ["id", "custom_id", "response", "error"]
    assert list(first["response"]) == ["status_code", "request_id", "body"]
    assert first["response"]["status_code"] == 200
    assert first["error"] is None
    assert len({answer["id"] for answer in answers} | {answer["response"]["request_id"] for answer in answers}) == 40


async def test_chats_are_answered_beside_completions(
    batch: MakeBatch,
    engine: FakeEngine,
    tokens: Tokens,
    out: Path,
) -> None:
    engine.script = says(tokens("yes"))
    chat = {"messages": [{"role": "user", "content": "Hello"}]}
    await run(batch([completion("a"), {"custom_id": "b", "method": "POST", "url": URLS[0], "body": chat}]))
    kinds = {answer["custom_id"]: answer["response"]["body"]["object"] for answer in read_answers(out)}
    assert kinds == {"a": "text_completion", "b": "chat.completion"}


async def test_a_file_that_names_another_model_is_answered_on_request(
    batch: MakeBatch, engine: FakeEngine, tokens: Tokens, out: Path
) -> None:
    engine.script = says(tokens("yes"))
    lines: list[dict[str, Any]] = [completion("a", model="gpt-4o-mini"), completion("b", model="demo"), completion("c")]
    lines.append(completion("d") | {"body": []})
    await run(batch(lines, any_model=True))
    *answers, refused = sorted(read_answers(out), key=lambda answer: answer["custom_id"])
    assert texts(answers) == {"a": " yes", "b": " yes", "c": " yes"}
    assert {answer["response"]["body"]["model"] for answer in answers} == {"demo"}
    assert refused["response"]["body"]["error"]["message"] == "The body must be a JSON object."


async def test_no_line_is_done_before_its_answer_is_on_the_disk(
    batch: MakeBatch, engine: FakeEngine, tokens: Tokens, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.script = says(tokens("yes"))
    synced = 0

    def sync(descriptor: int) -> None:
        nonlocal synced
        synced = out.read_bytes().count(b"\n")

    running = batch([completion(str(index)) for index in range(9)])
    monkeypatch.setattr("persimmon.server.offline.files.os.fsync", sync)
    monkeypatch.setattr(running.progress, "advance", lambda tokens: done.append(synced))
    done: list[int] = []
    await run(running)
    assert len(done) == 9
    assert all(number <= saved for number, saved in enumerate(done, 1))


async def test_no_more_lines_run_at_once_than_allowed(
    batch: MakeBatch,
    engine: FakeEngine,
    tokens: Tokens,
    out: Path,
) -> None:
    running = batch([completion(str(index)) for index in range(9)])
    task = asyncio.create_task(run(running, concurrency=3))
    for index in range(9):
        submitted = await engine.submissions(min(index + 3, 9))
        assert len(engine.submitted) == min(index + 3, 9)
        await engine.send(submitted[index].sequence_id, tokens("yes"), "length")
    await task
    assert len(read_answers(out)) == 9


async def test_an_answer_is_in_the_file_while_others_still_run(
    batch: MakeBatch,
    engine: FakeEngine,
    tokens: Tokens,
    out: Path,
) -> None:
    running = batch([completion(name) for name in "abc"])
    task = asyncio.create_task(run(running, concurrency=2))
    first, _ = await engine.submissions(2)
    await engine.send(first.sequence_id, tokens("yes"), "length")
    await engine.submissions(3)  # the next line is begun when the answer is written
    assert texts(read_answers(out)) == {"a": " yes"}
    task.cancel()
    await asyncio.wait((task,))


async def test_a_cancelled_batch_aborts_what_runs_and_keeps_what_was_answered(
    batch: MakeBatch,
    engine: FakeEngine,
    tokens: Tokens,
    out: Path,
) -> None:
    task = asyncio.create_task(run(batch([completion(name) for name in "abcd"]), concurrency=2))
    first, second = await engine.submissions(2)
    await engine.send(first.sequence_id, tokens("yes"), "length")
    third = (await engine.submissions(3))[2]
    task.cancel()
    await asyncio.wait((task,))
    assert sorted(await engine.aborts(2)) == sorted([second.sequence_id, third.sequence_id])
    assert list(texts(read_answers(out))) == ["a"]
    engine.script = says(tokens("no"))
    await run(batch([completion(name) for name in "abcd"]))
    assert texts(read_answers(out)) == {"a": " yes", "b": " no", "c": " no", "d": " no"}


async def test_a_stopping_batch_finishes_what_runs_and_begins_nothing(
    batch: MakeBatch,
    engine: FakeEngine,
    tokens: Tokens,
    out: Path,
) -> None:
    running = batch([completion(name) for name in "abcd"])
    task = asyncio.create_task(run(running, concurrency=2))
    submitted = await engine.submissions(2)
    running.stopping = True
    for each in submitted:
        await engine.send(each.sequence_id, tokens("yes"), "length")
    await task
    assert texts(read_answers(out)) == {"a": " yes", "b": " yes"}


async def test_a_line_that_fails_has_an_answer_of_its_own_and_the_others_theirs(
    batch: MakeBatch,
    engine: FakeEngine,
    tokens: Tokens,
    out: Path,
) -> None:
    engine.script = says(tokens("yes"))
    lines: list[dict[str, Any] | str] = [
        "not json",
        completion("negative", max_tokens=-1),
        completion("elsewhere") | {"url": "/v1/responses"},
        completion("get") | {"method": "GET"},
        completion("streamed", stream=True),
        {"custom_id": "bodiless", "method": "POST", "url": "/v1/completions"},
        completion("listed") | {"body": []},
        completion("more") | {"priority": 1},
        {"method": "POST", "url": "/v1/completions", "body": {}},
        completion("other model", model="gpt"),
        completion("good", stream=False),
    ]
    running = batch(lines)
    await run(running)
    answers = read_answers(out)
    errors = {answer["custom_id"] or answer["error"]["line"]: answer["error"] for answer in answers if answer["error"]}
    assert {name: error["code"] for name, error in errors.items()} == {
        1: "invalid_json",
        "elsewhere": "invalid_url",
        "get": "invalid_method",
        "streamed": "stream_not_supported",
        "bodiless": "invalid_line",
        "more": "invalid_line",
        9: "invalid_line",
    }
    for name, part in {
        "elsewhere": "/v1/embeddings",
        "bodiless": "`body`",
        "more": "`priority`",
        9: "`custom_id`",
    }.items():
        assert part in errors[name]["message"]
    responses = {answer["custom_id"]: answer["response"] for answer in answers if answer["response"]}
    assert {name: response["status_code"] for name, response in responses.items()} == {
        "negative": 400,
        "listed": 400,
        "other model": 404,
        "good": 200,
    }
    assert responses["negative"]["body"]["error"]["param"] == "max_tokens"
    assert (running.output.answered, running.output.failed) == (1, 10)
    again = batch(lines)
    await run(again)
    assert read_answers(out) == answers
    assert (again.output.answered, again.output.failed) == (1, 10)


async def test_a_sequence_that_the_engine_gives_up_fails_its_line_alone(
    batch: MakeBatch,
    engine: FakeEngine,
    tokens: Tokens,
    out: Path,
) -> None:
    task = asyncio.create_task(run(batch([completion("a"), completion("b")])))
    first, second = await engine.submissions(2)
    await engine.send(first.sequence_id, [], "error")
    await engine.send(second.sequence_id, tokens("yes"), "length")
    await task
    statuses = {answer["custom_id"]: answer["response"]["status_code"] for answer in read_answers(out)}
    assert statuses == {"a": 500, "b": 200}


async def test_a_dead_engine_ends_the_batch_and_leaves_its_lines_unanswered(
    batch: MakeBatch,
    engine: FakeEngine,
    tokens: Tokens,
    out: Path,
) -> None:
    task = asyncio.create_task(run(batch([completion(name) for name in "abc"]), concurrency=2))
    first, _ = await engine.submissions(2)
    await engine.send(first.sequence_id, tokens("yes"), "length")
    await engine.submissions(3)
    await engine.die()
    with pytest.raises(EngineLostError):
        await task
    assert texts(read_answers(out)) == {"a": " yes"}
