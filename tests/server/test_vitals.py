"""Heartbeat and load through shared memory: when an engine is overdue, and what all workers want of it."""

import multiprocessing
from pathlib import Path

import pytest

from persimmon.server.step_watch import (
    CPU_STEP_SECONDS,
    GPU_STEP_SECONDS,
    WORKER_START_SECONDS,
    StepWatch,
    WorkerWatch,
    step_limit,
)
from persimmon.server.vitals import Vitals, WorkerLoad


class Clock:
    seconds = 50.0

    def nanoseconds(self) -> int:
        return int(self.seconds * 1e9)

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def vitals(clock: Clock) -> Vitals:
    return Vitals.private(2, clock.nanoseconds)


IDLE, BUSY = WorkerLoad(0, 0), WorkerLoad(3, 40)


def submit(vitals: Vitals, worker: int, load: WorkerLoad, engine: int = 0) -> None:
    vitals.tell(worker, load)
    vitals.tell_of(worker, engine, load)


def test_an_engine_without_work_is_never_overdue(vitals: Vitals, clock: Clock) -> None:
    vitals.beat(False)
    clock.seconds += 10_000
    assert vitals.overdue_seconds() == 0


def test_an_engine_is_overdue_from_its_last_step_on(vitals: Vitals, clock: Clock) -> None:
    submit(vitals, 0, BUSY)
    clock.seconds += 5
    vitals.beat(True)
    clock.seconds += 7
    assert vitals.overdue_seconds() == 7
    vitals.beat(True)
    assert vitals.overdue_seconds() == 0


def test_an_idle_engine_is_overdue_from_when_there_was_work(vitals: Vitals, clock: Clock) -> None:
    vitals.beat(False)
    clock.seconds += 1000
    submit(vitals, 1, BUSY)
    clock.seconds += 2
    submit(vitals, 0, BUSY)
    clock.seconds += 1
    assert vitals.overdue_seconds() == 3
    submit(vitals, 1, IDLE)
    assert vitals.overdue_seconds() == 1


def test_an_engine_that_hangs_in_a_step_whose_clients_have_left_is_overdue(vitals: Vitals, clock: Clock) -> None:
    submit(vitals, 0, BUSY)
    vitals.beat(True)
    submit(vitals, 0, IDLE)
    clock.seconds += 4
    assert vitals.overdue_seconds() == 4


def test_what_a_dead_process_has_told_is_forgotten(vitals: Vitals, clock: Clock) -> None:
    vitals.beat(True)
    submit(vitals, 0, BUSY)
    submit(vitals, 1, WorkerLoad(1, 2))
    vitals.forget_engine()
    vitals.forget_worker(0)
    assert vitals.load == WorkerLoad(1, 2)
    vitals.forget_worker(1)
    clock.seconds += 100
    assert vitals.overdue_seconds() == 0


def tell(path: Path) -> None:
    Vitals.open(path).tell(1, WorkerLoad(2, 7))


def test_processes_see_what_the_others_tell(tmp_path: Path) -> None:
    vitals = Vitals.create(tmp_path / "vitals", 2)
    vitals.tell(0, WorkerLoad(5, 11))
    process = multiprocessing.get_context("spawn").Process(target=tell, args=(tmp_path / "vitals",))
    process.start()
    process.join()
    assert vitals.load == WorkerLoad(7, 18)


def test_who_was_stopped_with_the_engine_gives_it_time(vitals: Vitals, clock: Clock) -> None:
    watch = StepWatch(vitals, clock=clock)
    submit(vitals, 0, BUSY)
    clock.seconds += 1
    assert watch.overdue_seconds() == 1
    clock.seconds += 3600  # the whole server was stopped
    assert watch.overdue_seconds() == 0
    clock.seconds += 1
    assert watch.overdue_seconds() == 1
    watch.restart()
    assert watch.overdue_seconds() == 0


def test_steps_may_take_longer_on_a_cpu_unless_told_otherwise() -> None:
    assert step_limit(None, "cpu (2 threads)") == CPU_STEP_SECONDS
    assert step_limit(None, "cuda:0 (NVIDIA H100)") == GPU_STEP_SECONDS
    assert step_limit(7, "cuda:0") == 7


@pytest.fixture
def watch(vitals: Vitals, clock: Clock) -> WorkerWatch:
    return WorkerWatch(vitals=vitals, worker=1, limit=30, clock=clock)


def look_on(watch: WorkerWatch, clock: Clock, seconds: float) -> float | None:
    """Looks every second for some time; what the last look said."""
    for _ in range(int(seconds)):
        clock.seconds += 1
        hung = watch.hung_seconds()
    return hung


def test_a_worker_whose_event_loop_turns_is_not_hung(vitals: Vitals, clock: Clock, watch: WorkerWatch) -> None:
    for _ in range(100):
        vitals.beat_worker(1)
        assert look_on(watch, clock, 1) is None
    assert look_on(watch, clock, 29) is None
    vitals.beat_worker(0)  # another
    assert look_on(watch, clock, 1) == 31


def test_a_worker_has_more_time_to_start(vitals: Vitals, clock: Clock, watch: WorkerWatch) -> None:
    assert look_on(watch, clock, WORKER_START_SECONDS) is None
    assert look_on(watch, clock, 1) == WORKER_START_SECONDS + 1
    watch.restart()
    assert look_on(watch, clock, 1) is None


def test_a_worker_that_was_stopped_with_its_supervisor_is_not_hung(
    vitals: Vitals, clock: Clock, watch: WorkerWatch
) -> None:
    vitals.beat_worker(1)
    assert look_on(watch, clock, 10) is None
    clock.seconds += 3600
    assert watch.hung_seconds() is None
    assert look_on(watch, clock, 30) is None
    assert look_on(watch, clock, 1) == 31


def test_the_heartbeat_of_a_dead_worker_is_forgotten(vitals: Vitals) -> None:
    vitals.beat_worker(1)
    assert vitals.silent_seconds(1) == 0
    vitals.forget_worker(1)
    assert vitals.silent_seconds(1) is None


def test_each_engine_has_its_own_heartbeat_and_load(clock: Clock) -> None:
    vitals = Vitals.private(2, clock.nanoseconds, engines=3)
    vitals.tell_of(0, 0, WorkerLoad(1, 5))
    vitals.tell_of(1, 2, BUSY)
    vitals.tell_of(0, 2, WorkerLoad(2, 2))
    assert [vitals.load_of(engine) for engine in range(3)] == [WorkerLoad(1, 5), IDLE, WorkerLoad(5, 42)]
    clock.seconds += 4
    vitals.beat(True, engine=0)
    assert [vitals.overdue_seconds(engine) for engine in range(3)] == [0, 0, 4]
    assert [StepWatch(vitals, engine, clock).overdue_seconds() for engine in range(3)] == [0, 0, 0]
    vitals.forget_worker(1)
    assert vitals.load_of(2) == WorkerLoad(2, 2)
    clock.seconds += 1
    vitals.forget_engine(0)
    assert [vitals.overdue_seconds(engine) for engine in range(3)] == [5, 0, 5]


def test_what_is_not_submitted_yet_is_no_engines_work(vitals: Vitals, clock: Clock) -> None:
    vitals.tell(0, BUSY)
    clock.seconds += 1000
    assert vitals.load == BUSY
    assert vitals.load_of(0) == IDLE
    assert vitals.overdue_seconds() == 0


def test_the_number_of_engines_is_in_the_file(tmp_path: Path) -> None:
    Vitals.create(tmp_path / "vitals", workers=2, engines=3).tell_of(1, 2, BUSY)
    opened = Vitals.open(tmp_path / "vitals")
    assert opened.engines == 3
    assert opened.load_of(2) == BUSY
