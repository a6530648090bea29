import math

import pytest

from persimmon.server.engine.load import Load
from persimmon.server.vitals import Vitals, WorkerLoad


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_workers_see_the_load_of_all():
    vitals = Vitals.private(2)
    one, other = Load(vitals, 0), Load(vitals, 1)
    one.add(2, 30)
    other.add(1, 5)
    assert one.total == other.total == WorkerLoad(3, 35)
    assert other.own == WorkerLoad(1, 5)
    one.add(0, -30)
    one.end_one()
    assert other.total == WorkerLoad(2, 5)


def test_a_worker_that_takes_anothers_place_begins_with_nothing():
    vitals = Vitals.private(1)
    Load(vitals, 0).add(4, 4)
    assert Load(vitals, 0).total == WorkerLoad(0, 0)


def test_the_wait_is_what_is_inside_over_what_leaves_in_a_second():
    clock = Clock()
    load = Load(clock=clock)
    assert load.seconds_to_drain == 0
    load.add(1000, 0)
    assert load.seconds_to_drain == math.inf
    for _ in range(500):  # five a second, for long enough
        clock.now += 0.2
        load.add(1, 0)
        load.end_one()
    assert load.seconds_to_drain == pytest.approx(200, rel=0.05)
