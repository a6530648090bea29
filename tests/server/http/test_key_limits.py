import asyncio
from dataclasses import dataclass
from pathlib import Path

import pytest

from server.http.errors import ApiError
from server.http.key_limits import KeyLimiter, KeyLimits


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def ask(limiter: KeyLimiter, key: int = 0) -> int | None:
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
    limiter = KeyLimiter(KeyLimits(per_minute=4), 1, clock=clock)
    assert [ask(limiter) for _ in range(6)] == [None] * 4 + [15, 15]
    clock.now += 14.9
    assert ask(limiter) == 1
    clock.now += 0.1
    assert [ask(limiter), ask(limiter)] == [None, 15]
    clock.now += 3600
    assert [ask(limiter) for _ in range(5)] == [None] * 4 + [15]


def test_a_client_that_waits_as_long_as_it_is_told_is_let_in() -> None:
    clock = Clock()
    limiter = KeyLimiter(KeyLimits(per_minute=7), 1, clock=clock)
    for _ in range(100):
        wait = ask(limiter)
        if wait is not None:
            clock.now += wait
            assert ask(limiter) is None


def test_so_many_requests_of_a_key_run_at_once() -> None:
    limiter = KeyLimiter(KeyLimits(concurrent=2), 1)
    with limiter.request(0):
        with limiter.request(0):
            assert ask(limiter) == 1
        assert ask(limiter) is None


def test_a_request_that_is_refused_for_another_reason_takes_none_of_the_rate() -> None:
    limiter = KeyLimiter(KeyLimits(concurrent=1, per_minute=2), 1, clock=Clock())
    with limiter.request(0):
        assert [ask(limiter) for _ in range(5)] == [1] * 5
    assert ask(limiter) is None


def test_one_keys_requests_are_nothing_to_another() -> None:
    limiter = KeyLimiter(KeyLimits(concurrent=1, per_minute=1), 2, clock=Clock())
    with limiter.request(0):
        assert ask(limiter, 1) is None
    assert ask(limiter, 0) is not None


def test_a_request_that_fails_or_is_cancelled_runs_no_more() -> None:
    limiter = KeyLimiter(KeyLimits(concurrent=1), 1)
    for error in (ZeroDivisionError, asyncio.CancelledError):
        with pytest.raises(error), limiter.request(0):
            raise error
    assert ask(limiter) is None


def test_workers_count_together(tmp_path: Path) -> None:
    clock = Clock()
    one, other = (KeyLimiter(KeyLimits(2, 3), 2, worker, 2, tmp_path / "limits", clock=clock) for worker in range(2))
    with one.request(1), other.request(1):
        assert [ask(one, 1), ask(other, 1)] == [1, 1]
    assert ask(other, 1) is None
    assert [ask(one, 1), ask(other, 1)] == [20, 20]
    assert ask(one, 0) is None


def test_what_a_worker_left_when_it_died_is_forgotten_when_the_next_one_begins(tmp_path: Path) -> None:
    def worker(number: int) -> KeyLimiter:
        return KeyLimiter(KeyLimits(concurrent=2), 1, number, 2, tmp_path / "limits")

    lives, dies = worker(0), worker(1)
    open_requests = [limiter.request(0) for limiter in (lives, dies)]
    for each in open_requests:
        each.__enter__()
    assert ask(lives) == 1
    worker(1)
    with lives.request(0):
        assert ask(lives) == 1
    open_requests[0].__exit__(None, None, None)
