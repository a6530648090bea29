import os

import pytest

from benchmarks.api import serving
from benchmarks.refusals import KINDS, Refusals, measure, table
from persimmon.server.bench.report import Distribution


def test_a_refusal_costs_what_it_takes_in_python_and_in_the_system() -> None:
    answer = Distribution.of([0.0002, 0.0004])
    assert answer is not None
    measured = Refusals("keys", 2, worker_user_us=61.2, worker_system_us=30.4, client_us=28.0, answer_ms=answer)
    assert measured.worker_us == pytest.approx(91.6)
    assert "| keys | 92 | 30 | 28 | 0.30 | 0.40 |" in table([measured])


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="worker and client need a core each")
def test_every_request_to_a_full_worker_is_refused() -> None:
    with serving(1, KINDS["keys"]) as bench:
        assert measure(bench, "keys", 10, warm_up=0).requests == 10
