"""A server whose engine has two ranks: the death of any of them is that of the engine, and no process outlives it."""

import os
import select
import signal
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.end_to_end.serving import Server, serving
from tests.end_to_end.test_processes import LONG, answers, is_healthy, stopped, wait_until

SETTINGS = ("--tensor-parallel-size", "2", "--kv-cache-memory", "64MB", "--step-timeout", "5")

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each rank needs a core")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(*SETTINGS) as server:
        yield server


def other_rank(engine: int) -> int:
    """The process id of the rank that an engine process has started."""
    (pid,) = (own.pid for own in psutil.Process(engine).children() if "spawn_main" in " ".join(own.cmdline()))
    return pid


def wait_for_end(descriptor: int) -> None:
    readable, _, _ = select.select([descriptor], [], [], 60)
    os.close(descriptor)
    assert readable


@pytest.mark.parametrize(
    ("which", "number"),
    [("other rank", signal.SIGKILL), ("other rank", signal.SIGSTOP), ("first rank", signal.SIGKILL)],
    ids=["other killed", "other stopped", "first killed"],
)
def test_a_rank_that_dies_or_hangs_ends_the_engine_and_another_takes_its_place(
    server: Server, which: str, number: signal.Signals
) -> None:
    engine = server.children()["engine"]
    other = other_rank(engine)
    ends = [os.pidfd_open(pid) for pid in (engine, other)]
    body = LONG | {"speculate": False}  # with guesses it might end first
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        os.kill(other if which == "other rank" else engine, number)
        events = [line for line in lines if line.startswith("data: ")]
    assert '"code":"engine_dead"' in events[-1]
    for end in ends:
        wait_for_end(end)
    wait_until(lambda: is_healthy(server))
    assert answers(server)
    successor = server.children()["engine"]
    assert {successor, other_rank(successor)}.isdisjoint({engine, other})


def test_an_idle_engine_notices_that_a_rank_has_died_and_none_outlives_the_server() -> None:
    with serving(*SETTINGS) as server:
        engine = server.children()["engine"]
        end = os.pidfd_open(engine)
        os.kill(other_rank(engine), signal.SIGKILL)
        wait_for_end(end)
        wait_until(lambda: is_healthy(server))
        assert any("rank 1 ended with code -9" in line for line in server.lines)
        assert other_rank(server.children()["engine"]) in server.processes()
        assert server.stop() == 0
        wait_until(lambda: not server.processes())


def test_the_ranks_of_a_killed_engine_do_not_stay_as_zombies() -> None:
    with serving(*SETTINGS) as server:
        engine = server.children()["engine"]
        other = other_rank(engine)
        ends = [os.pidfd_open(pid) for pid in (engine, other)]
        with stopped(server.process.pid):
            os.kill(engine, signal.SIGKILL)
            for end in ends:
                wait_for_end(end)
            assert psutil.Process(other).ppid() == server.process.pid
        wait_until(lambda: not psutil.pid_exists(other))
        wait_until(lambda: is_healthy(server))


def test_no_rank_outlives_a_killed_supervisor_not_even_a_stopped_one() -> None:
    with serving(*SETTINGS) as server:
        engine = server.children()["engine"]
        ends = [os.pidfd_open(pid) for pid in (engine, other_rank(engine))]
        for pid in (other_rank(engine), engine):
            os.kill(pid, signal.SIGSTOP)
        server.process.kill()
        for end in ends:
            wait_for_end(end)
