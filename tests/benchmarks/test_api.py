import asyncio
import os

import pytest

from benchmarks.api import (
    CHECKPOINT,
    Counter,
    FirstToken,
    Throughput,
    request,
    serving,
    spoken_token,
    table,
)
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.bench.report import Distribution


@pytest.mark.parametrize("size", range(1, 9))
def test_words_are_counted_wherever_the_bytes_are_cut(size: int) -> None:
    text = b"word one word two wordword three wor d"
    counter = Counter(b"word")
    assert sum(counter.feed(text[place : place + size]) for place in range(0, len(text), size)) == 4


def test_a_word_of_equal_letters_is_counted_once() -> None:
    counter = Counter(b"aa")
    assert [counter.feed(piece) for piece in (b"a", b"a", b"b", b"aa")] == [0, 1, 0, 1]


def test_figures_are_of_one_core_and_of_its_processor_time() -> None:
    measured = Throughput(
        endpoint="chat", workers=2, streams=8, tokens=1000, events=1008, wall_s=0.5, worker_cpu_s=0.25, client_cpu_s=0.1
    )
    assert measured.per_core_second == 1000
    assert measured.per_cpu_second == 4000
    added = Distribution.of([0.001, 0.003])
    assert added is not None
    shown = table([measured], [FirstToken(endpoint="chat", prompt_tokens=64, requests=2, added_ms=added)])
    assert "| chat | 8 | 1,000 | 4,000 | 250.0 | 1.01 |" in shown
    assert "| chat | 64 | 2.00 | 2.98 | 3.00 |" in shown


def test_the_spoken_token_is_a_word_that_a_text_of_it_is_made_of() -> None:
    tokenizer = Tokenizer.from_folder(CHECKPOINT)
    token_id, word = spoken_token(tokenizer)
    assert tokenizer.encode(f"{word.decode()} {word.decode()}", add_bos=False) == [token_id, token_id]


def test_a_request_says_how_long_it_is() -> None:
    head, _, body = request("completions", "a", 5).partition(b"\r\n\r\n")
    assert b"Content-Length: %d" % len(body) in head


def test_more_workers_than_cores_are_refused() -> None:
    with pytest.raises(ValueError, match="workers and the client need 1001 cores"), serving(1000):
        pass


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="workers and client need a core each")
def test_every_token_of_real_workers_is_counted_and_the_first_is_timed() -> None:
    async def run() -> None:
        for endpoint in ("completions", "chat"):
            measured = await bench.throughput(endpoint, 3, 20)
            assert measured.tokens == 60
            assert measured.events >= 60
            first = await bench.first_token(endpoint, 64, 3)
            assert 0 < first.added_ms.median <= first.added_ms.max

    with serving(1) as bench:
        asyncio.run(run())
        assert all(worker.is_alive() for worker in bench.workers)
    assert not any(worker.is_alive() for worker in bench.workers)
