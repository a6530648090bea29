import asyncio
import resource
from dataclasses import dataclass
from pathlib import Path

import pytest

from persimmon.server.http.errors import ApiError
from persimmon.server.http.middleware.key_limits import KeyLimiter, KeyLimits

ONE, OTHER = b"the digest of one key", b"the digest of another"


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def ask(limiter: KeyLimiter, key: bytes = ONE) -> int | None:
    """Sends one request, answered at once: None where it was let in, else when to come again."""
    try:
        with limiter.request(key):
            return None
    except ApiError as error:
        refused = error
    assert (refused.status, refused.body.error.code) == (429, "rate_limit_exceeded")
    return refused.retry_after


def test_a_key_may_spend_its_minute_at_once_and_then_goes_on_evenly() -> None:
    clock = Clock()
    limiter = KeyLimiter(KeyLimits(per_minute=4), [ONE], clock=clock)
    assert [ask(limiter) for _ in range(6)] == [None] * 4 + [15, 15]
    clock.now += 14.9
    assert ask(limiter) == 1
    clock.now += 0.1
    assert [ask(limiter), ask(limiter)] == [None, 15]
    clock.now += 3600
    assert [ask(limiter) for _ in range(5)] == [None] * 4 + [15]


def test_a_client_that_waits_as_long_as_it_is_told_is_let_in() -> None:
    clock = Clock()
    limiter = KeyLimiter(KeyLimits(per_minute=7), [ONE], clock=clock)
    for _ in range(100):
        wait = ask(limiter)
        if wait is not None:
            clock.now += wait
            assert ask(limiter) is None


def test_so_many_requests_of_a_key_run_at_once() -> None:
    limiter = KeyLimiter(KeyLimits(concurrent=2), [ONE])
    with limiter.request(ONE):
        with limiter.request(ONE):
            assert ask(limiter) == 1
        assert ask(limiter) is None


def test_a_request_that_is_refused_for_another_reason_takes_none_of_the_rate() -> None:
    limiter = KeyLimiter(KeyLimits(concurrent=1, per_minute=2), [ONE], clock=Clock())
    with limiter.request(ONE):
        assert [ask(limiter) for _ in range(5)] == [1] * 5
    assert ask(limiter) is None


def test_one_keys_requests_are_nothing_to_another() -> None:
    limiter = KeyLimiter(KeyLimits(concurrent=1, per_minute=1), [ONE, OTHER], clock=Clock())
    with limiter.request(ONE):
        assert ask(limiter, OTHER) is None
    assert ask(limiter, ONE) is not None


def test_a_request_that_fails_or_is_cancelled_runs_no_more() -> None:
    limiter = KeyLimiter(KeyLimits(concurrent=1), [ONE])
    for error in (ZeroDivisionError, asyncio.CancelledError):
        with pytest.raises(error), limiter.request(ONE):
            raise error
    assert ask(limiter) is None


def test_workers_count_together(tmp_path: Path) -> None:
    clock = Clock()
    one, other = (
        KeyLimiter(limits=KeyLimits(2, 3), keys=[ONE, OTHER], worker=worker, workers=2, folder=tmp_path, clock=clock)
        for worker in range(2)
    )
    with one.request(OTHER), other.request(OTHER):
        assert [ask(one, OTHER), ask(other, OTHER)] == [1, 1]
    assert ask(other, OTHER) is None
    assert [ask(one, OTHER), ask(other, OTHER)] == [20, 20]
    assert ask(one, ONE) is None


def test_what_a_worker_left_when_it_died_is_forgotten_when_the_next_one_begins(tmp_path: Path) -> None:
    def worker(number: int) -> KeyLimiter:
        return KeyLimiter(limits=KeyLimits(concurrent=2), keys=[ONE], worker=number, workers=2, folder=tmp_path)

    lives, dies = worker(0), worker(1)
    open_requests = [limiter.request(ONE) for limiter in (lives, dies)]
    for each in open_requests:
        each.__enter__()
    assert ask(lives) == 1
    worker(1)
    with lives.request(ONE):
        assert ask(lives) == 1
    open_requests[0].__exit__(None, None, None)


def test_a_key_that_stays_keeps_its_allowance_and_its_open_requests_when_keys_change() -> None:
    clock = Clock()
    limiter = KeyLimiter(KeyLimits(concurrent=2, per_minute=3), [ONE, OTHER], clock=clock)
    with limiter.request(OTHER):
        limiter.replace([b"a new one", OTHER])
        assert ask(limiter, OTHER) is None
        with limiter.request(OTHER):
            assert ask(limiter, OTHER) == 1
    assert ask(limiter, OTHER) == 20
    assert [ask(limiter, b"a new one") for _ in range(4)] == [None] * 3 + [20]


def test_a_request_whose_key_is_taken_away_counts_again_when_it_comes_back() -> None:
    limiter = KeyLimiter(KeyLimits(concurrent=1), [ONE, OTHER])
    with limiter.request(ONE):
        with limiter.request(OTHER):
            limiter.replace([b"a new one"])
        limiter.replace([ONE, OTHER])
        assert ask(limiter, ONE) == 1
        assert ask(limiter, OTHER) is None
    assert ask(limiter, ONE) is None


def test_workers_count_together_again_when_all_of_them_have_the_new_keys(tmp_path: Path) -> None:
    clock = Clock()
    workers = [
        KeyLimiter(limits=KeyLimits(2, 4), keys=[ONE, OTHER], worker=number, workers=2, folder=tmp_path, clock=clock)
        for number in range(2)
    ]
    with workers[0].request(ONE), workers[1].request(ONE):
        for keys in ([ONE], [OTHER, ONE], [ONE, OTHER]):  # the last ones are the first ones again
            for worker in workers:
                worker.replace(keys)
            assert [ask(worker) for worker in workers] == [1, 1]
    assert ask(workers[0]) is None
    assert ask(workers[1]) is None
    assert [ask(worker) for worker in workers] == [15, 15]


def test_where_no_file_can_be_written_new_keys_hold_and_each_worker_counts_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workers = [
        KeyLimiter(limits=KeyLimits(concurrent=1), keys=[ONE], worker=number, workers=2, folder=tmp_path)
        for number in range(2)
    ]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))  # as with a full disk
    try:
        for worker in workers:
            worker.replace([OTHER])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert len(caplog.records) == 2
    assert "File too large; each API worker now counts the limits of API keys separately" in caplog.text
    with workers[0].request(OTHER), workers[1].request(OTHER):
        assert [ask(worker, OTHER) for worker in workers] == [1, 1]
    for worker in workers:
        worker.replace([ONE])
    with workers[0].request(ONE):
        assert ask(workers[1]) == 1
