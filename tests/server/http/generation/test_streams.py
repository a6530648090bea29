import asyncio
import contextlib
import functools
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persimmon.model.sampling_params import SamplingParams
from persimmon.model.token_logprobs import TokenLogprobs
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.messages import SequenceOutput
from persimmon.server.http.generation.generation import Generation, Prompt
from persimmon.server.http.generation.pieces import Answer
from persimmon.server.http.generation.sample_text import SampleText
from persimmon.server.http.generation.stop_strings import StopChecker, StopStrings
from persimmon.server.http.generation.token_report import token_text
from persimmon.server.http.request_record import RequestRecord
from tests.server.http.conftest import LiveServer
from tests.server.http.fake_engine import ONLY_TEXT, FakeEngine, Sample, outputs, says

pytestmark = pytest.mark.anyio

EOS = 1
Tokens = Callable[[str], list[int]]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def events(body: str) -> list[str]:
    assert body.endswith("\n\n")
    frames = body.split("\n\n")[:-1]
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    return [frame.removeprefix("data: ") for frame in frames]


async def stream(http: httpx.AsyncClient, path: str, **body: object) -> list[dict]:
    """The chunks of a stream that ends well."""
    asked = {"prompt": "Hello"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "Hi"}]}
    response = await http.post(path, json={**asked, **body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks]
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in parsed}) == 1
    return parsed


async def test_a_completion_stream_is_one_chunk_a_token(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    ids = tokens("a sweet fruit")
    engine.script = says(ids, EOS)
    chunks = await stream(http, COMPLETIONS, max_tokens=50)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == " a sweet fruit"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk["object"] == "text_completion" and "usage" not in chunk for chunk in chunks)
    assert len(chunks) <= len(ids) + 1


async def test_a_chat_stream_begins_with_the_role_and_ends_with_the_reason(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says(tokens("Hello you!"), EOS)
    first, *middle, last = await stream(http, CHAT)
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}
    ]
    assert all(set(chunk["choices"][0]["delta"]) == {"content"} for chunk in middle)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == "Hello you!"
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop", "logprobs": None}]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_usage_comes_last_without_choices_and_only_when_asked_for(
    http: httpx.AsyncClient, engine: FakeEngine, path: str
) -> None:
    engine.script = says([9, 10], EOS, cached_tokens=1)
    *chunks, last = await stream(http, path, stream_options={"include_usage": True})
    prompt_tokens = len(engine.submitted[0].token_ids)
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 3,
        "total_tokens": prompt_tokens + 3,
        "prompt_tokens_details": {"cached_tokens": 1, "audio_tokens": 0},
        "completion_tokens_details": ONLY_TEXT,
    }
    assert all(chunk["choices"] and chunk["usage"] is None for chunk in chunks)
    for options in ({"include_usage": False}, None):
        chunks = await stream(http, path, stream_options=options)
        assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks)


async def test_a_stop_string_never_shows_and_a_false_start_does(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says(tokens("ST is no end but STOP is and more"))
    chunks = await stream(http, COMPLETIONS, stop=["STOP"], max_tokens=50)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == " ST is no end but "
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_chunks_carry_their_token_ids_when_asked_for(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    ids = tokens("🙂 yes")
    engine.script = says(ids, EOS)
    chunks = await stream(http, COMPLETIONS, prompt=[5, 6], return_token_ids=True, n=2, max_tokens=50)
    for index in (0, 1):
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [token for choice in choices for token in choice["token_ids"]] == [*ids, EOS]
        assert choices[0]["prompt_token_ids"] == [5, 6]
        assert all("prompt_token_ids" not in choice for choice in choices[1:])


async def test_a_chat_stream_carries_the_prompts_ids_once(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens
) -> None:
    engine.script = says(tokens("yes"), EOS)
    first, *others = await stream(http, CHAT, return_token_ids=True, n=2)
    assert first["prompt_token_ids"] == engine.submitted[0].token_ids
    assert all("prompt_token_ids" not in chunk for chunk in others)
    ids = [
        token
        for chunk in others
        for choice in chunk["choices"]
        if choice["index"] == 1
        for token in choice.get("token_ids", [])
    ]
    assert ids == [*tokens("yes"), EOS]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_the_choices_of_a_stream_are_those_of_the_whole_answer(
    http: httpx.AsyncClient, engine: FakeEngine, tokens: Tokens, path: str
) -> None:
    def script(submit: Sample) -> list[SequenceOutput]:
        return outputs(submit.sequence_id, [[token] for token in tokens(f"number {submit.index}")])

    engine.script = script
    chunks = await stream(http, path, n=5, max_tokens=50)
    texts = [""] * 5
    reasons: list[list[str]] = [[] for _ in range(5)]
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        texts[choice["index"]] += choice["text"] if path == COMPLETIONS else choice["delta"].get("content", "")
        if choice["finish_reason"]:
            reasons[choice["index"]].append(choice["finish_reason"])
    space = " " if path == COMPLETIONS else ""
    assert texts == [f"{space}number {index}" for index in range(5)]
    assert reasons == [["length"]] * 5


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_an_error_before_the_first_token_is_an_ordinary_error(
    http: httpx.AsyncClient, engine: FakeEngine, path: str
) -> None:
    engine.script = lambda submit: [SequenceOutput(submit.sequence_id, [], "error", error="It cannot be run.")]
    asked = {"prompt": "Hello", "messages": [{"role": "user", "content": "Hi"}]}
    asked.pop("messages" if path == COMPLETIONS else "prompt")
    response = await http.post(path, json={**asked, "stream": True})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "generation_failed"


class OpenStream:
    """A stream over TCP, read event by event while the test decides what the engine sends next."""

    def __init__(self, response: httpx.Response) -> None:
        self._lines = response.aiter_lines()

    async def event(self) -> str:
        """The next event's data; an empty text when the stream has ended."""
        async with asyncio.timeout(20):
            async for line in self._lines:
                if line:
                    return line.removeprefix("data: ")
        return ""

    async def text(self) -> str:
        """The next chunk's text."""
        return json.loads(await self.event())["choices"][0]["text"]

    async def error(self) -> dict:
        """The last event's error."""
        error = json.loads(await self.event())["error"]
        assert await self.event() == ""
        return error


@contextlib.asynccontextmanager
async def opened(
    server: LiveServer, engine: FakeEngine, token_ids: list[int]
) -> AsyncIterator[tuple[OpenStream, Callable[..., Awaitable[None]]]]:
    """A completion's stream that begins with these tokens, and how its sequence gets more."""
    sequence = len(engine.submitted)

    async def first_tokens() -> None:
        submits = await engine.submissions(sequence + 1)
        await engine.send(submits[-1].sequence_id, token_ids)

    async with httpx.AsyncClient(base_url=server.url) as client, asyncio.TaskGroup() as tasks:
        tasks.create_task(first_tokens())
        body = {"prompt": "Hello", "stream": True, "max_tokens": 50}
        async with client.stream("POST", COMPLETIONS, json=body) as response:
            yield OpenStream(response), functools.partial(engine.send, engine.submitted[sequence].sequence_id)


async def test_a_token_is_on_its_way_before_the_next_one_is_made(
    server: LiveServer, engine: FakeEngine, tokens: Tokens
) -> None:
    async with opened(server, engine, tokens("one")) as (stream, send):
        assert await stream.text() == " one"
        await send(tokens("two"))
        assert await stream.text() == " two"
        await send(tokens("three"), "length")
        assert await stream.text() == " three"
        assert await stream.event() == "[DONE]"


async def test_no_chunk_is_empty_but_the_last(server: LiveServer, engine: FakeEngine, tokens: Tokens) -> None:
    async with opened(server, engine, tokens("yes")) as (stream, send):
        assert await stream.text() == " yes"
        space, *byte_tokens = tokens("🙂")
        assert len(byte_tokens) == 4
        for token in [space, *byte_tokens]:
            await send([token])
        seen = ""
        while seen != " 🙂":  # the space may come with the character, but no byte of it alone
            text = await stream.text()
            assert text in (" ", "🙂", " 🙂")
            seen += text
        await send([EOS], "stop")
        assert await stream.text() == ""
        assert await stream.event() == "[DONE]"


async def test_an_error_after_the_first_token_is_the_streams_last_event(
    server: LiveServer, engine: FakeEngine, tokens: Tokens
) -> None:
    async with opened(server, engine, tokens("yes")) as (stream, _):
        assert await stream.text() == " yes"
        await engine.send_output(SequenceOutput(engine.submitted[0].sequence_id, [], "error", error="It broke."))
        assert await stream.error() == {
            "message": "It broke.",
            "type": "server_error",
            "param": None,
            "code": "generation_failed",
        }


async def test_a_bug_in_the_middle_of_a_stream_shows_no_insides_and_aborts(
    server: LiveServer, engine: FakeEngine, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: SampleText, output: SequenceOutput) -> None:
        raise ZeroDivisionError("secret")

    async with opened(server, engine, tokens("yes")) as (stream, send):
        assert await stream.text() == " yes"
        monkeypatch.setattr(SampleText, "push", broken)
        await send(tokens("no"))
        error = await stream.error()
        assert error["code"] == "internal_error"
        assert "secret" not in error["message"]
        assert await engine.aborts(1) == [engine.submitted[0].sequence_id]


async def test_when_the_engine_dies_every_open_request_ends_with_an_error(
    server: LiveServer, engine: FakeEngine, tokens: Tokens
) -> None:
    async with (
        httpx.AsyncClient(base_url=server.url) as client,
        opened(server, engine, tokens("yes")) as (first, _),
        opened(server, engine, tokens("yes")) as (second, _),
    ):
        plain = asyncio.create_task(client.post(COMPLETIONS, json={"prompt": "Hello"}))
        await engine.submissions(3)
        await first.text()
        await second.text()
        await engine.die()
        assert (await first.error())["code"] == "engine_dead"
        assert (await second.error())["code"] == "engine_dead"
        for response in (await plain, await client.post(COMPLETIONS, json={"prompt": "Hello"})):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "engine_dead"


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(
    token_ids=st.lists(st.one_of(st.integers(2, 4095), st.integers(3, 258)), max_size=12),
    cuts=st.sets(st.integers(0, 12)),
    stop=st.lists(st.sampled_from(["a", "e ", "\N{REPLACEMENT CHARACTER}", "th", "\n\n"]), max_size=2),
)
def test_the_pieces_of_a_text_join_to_the_same_text_however_its_tokens_come(
    tokenizer: Tokenizer, token_ids: list[int], cuts: set[int], stop: list[str]
) -> None:
    bounds = sorted({0, *(cut for cut in cuts if cut < len(token_ids)), len(token_ids)})
    steps = [token_ids[start:end] for start, end in itertools.pairwise(bounds)] or [[]]
    answer = read(tokenizer, generation(stop), outputs(1, steps))
    checker = StopChecker(StopStrings(stop))
    assert answer.text == checker.push(tokenizer.decode(token_ids)) + checker.finish()
    assert answer.finish_reason == ("stop" if checker.matched else "length")
    # Each token is reported once, where its text begins.
    ids = answer.token_ids
    assert [report.text for report in answer.reports] == [token_text(tokenizer, token_id) for token_id in ids]
    whole = tokenizer.decode(ids)
    for place, report in enumerate(answer.reports):
        before = tokenizer.detokenizer().push(ids[:place])
        assert report.offset == len(before)
        assert whole.startswith(before)


def generation(stop: Sequence[str], *, is_chat: bool = False, echo: bool = False) -> Generation:
    """A request for one sample that reports its tokens."""
    prompt = Prompt([0], 99, SamplingParams())
    return Generation(
        [prompt],
        n=1,
        samples=1,
        stop_token_ids=[],
        stop_strings=StopStrings(stop),
        is_chat=is_chat,
        echo=echo,
        logprobs=0,
        record=RequestRecord(),
    )


def read(
    tokenizer: Tokenizer, request: Generation, steps: Iterable[SequenceOutput], sample: SampleText | None = None
) -> Answer:
    """What a sample's outputs become; a token is not reported before some of its text is sent."""
    sample = sample or SampleText(0, tokenizer, request)
    answer = Answer()
    for output in steps:
        piece = sample.push(output)
        answer.add(piece)
        if piece.finish_reason is not None:
            break
        assert all(report.offset < len(answer.text) for report in answer.reports)
    return answer


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    token_ids=st.lists(st.one_of(st.integers(2, 4095), st.integers(3, 258)), min_size=1, max_size=12),
    stop=st.lists(st.sampled_from(["a", "e ", "th"]), max_size=2),
)
def test_the_tokens_of_a_chats_answer_are_those_of_its_text(
    tokenizer: Tokenizer, token_ids: list[int], stop: list[str]
) -> None:
    answer = read(tokenizer, generation(stop, is_chat=True), outputs(1, [[token_id] for token_id in token_ids]))
    reported = b"".join(report.text.utf8 or b"" for report in answer.reports).decode(errors="replace")
    assert reported.startswith(answer.text) if answer.finish_reason == "stop" else reported == answer.text
    assert all(report.offset < len(answer.text) for report in answer.reports)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.lists(st.one_of(st.integers(2, 4095), st.integers(3, 258)), min_size=1, max_size=6),
    token_ids=st.lists(st.one_of(st.integers(2, 4095), st.integers(3, 258)), min_size=1, max_size=6),
)
def test_an_echo_reads_as_if_prompt_and_answer_were_one_text(
    tokenizer: Tokenizer, prompt: list[int], token_ids: list[int]
) -> None:
    request = generation([], echo=True)
    sample = SampleText(0, tokenizer, request)
    for _ in sample.echo(
        prompt,
        [
            TokenLogprobs(token_id=token_id, logprob=-float(token_id), top_ids=[], top_logprobs=[])
            for token_id in prompt[1:]
        ],
    ):
        pass
    answer = read(tokenizer, request, outputs(1, [[token_id] for token_id in token_ids]), sample)
    assert answer.text == tokenizer.decode(prompt + token_ids, from_start=True)
    assert answer.token_ids == token_ids
    assert [report.logprob for report in answer.reports[: len(prompt)]] == [None, *(-float(id) for id in prompt[1:])]
    for place, report in enumerate(answer.reports):
        before = tokenizer.detokenizer().push((prompt + token_ids)[:place])
        prefixed = tokenizer.begins_with_prefix(prompt + token_ids) and bool(before)
        assert report.offset == len(before) - prefixed


def test_a_stop_string_counts_only_after_min_tokens(tokenizer: Tokenizer, tokens: Callable[[str], list[int]]) -> None:
    ids = tokens("one two one two")
    sample = SampleText(0, tokenizer, generation(["one"]), min_tokens=len(ids) // 2)
    answer = read(tokenizer, generation(["one"]), outputs(1, [[token_id] for token_id in ids]), sample)
    assert answer.text == " one two "
