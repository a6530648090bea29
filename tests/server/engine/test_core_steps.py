"""What an engine records of its steps: times, tokens and log lines."""

import itertools
import logging

import pytest

from persimmon.server.engine.step_cost import StepCostModel, StepCosts, StepWork
from tests.server.engine.engine_turns import House, last_stats, submit, tokens_of
from tests.server.engine.fake_model import generate_alone


class KnownCosts(StepCostModel):
    """Each token of a chunk takes a second; a step with decodes has twenty for them."""

    def __init__(self) -> None:
        super().__init__()
        self.observed: list[tuple[StepWork, float]] = []

    def observe(self, work: StepWork, seconds: float) -> None:
        self.observed.append((work, seconds))

    @property
    def costs(self) -> StepCosts:
        return StepCosts(1.0, 0.0, 0.0, 0.0, 1.0, 0.0, longest=21.0)


@pytest.mark.parametrize("overlap", [False, True])
def test_the_engine_learns_what_steps_take_and_bounds_chunks_by_it(overlap: bool) -> None:
    costs = KnownCosts()
    house = House("inproc://engine", overlap=overlap, costs=costs)
    worker = house.worker()
    worker.send(submit(1, [1], 30))
    house.first_step()
    worker.send(submit(2, [2, 0] * 30, 1))
    house.finish()
    assert tokens_of(worker.outputs(), 2) == generate_alone([2, 0] * 30, 1)[0]
    assert [work.chunk_tokens for work, _ in costs.observed if work.decodes and work.chunk_tokens] == [20, 20, 20]
    assert len(costs.observed) == house.scheduler.stats().steps
    assert all(seconds > 0 for _, seconds in costs.observed)
    house.close()


def test_steps_are_counted_with_their_time_their_tokens_and_the_graphs_among_them() -> None:
    house = House("inproc://steps", graph_replays=lambda: 5)
    worker = house.worker()
    worker.send(submit(1, list(range(9)), 3))
    house.turn()
    house.turn_until(house.is_empty)
    last = worker.reports()[-1].stats
    house.close()
    assert sum(last.step_counts) == last.steps == 3
    assert last.step_seconds > 0
    # The prompt is 9 tokens, and then each token but the last is computed.
    assert last.step_tokens == 9 + 1 + 1
    assert last.step_token_counts[:3] == (2, 0, 1)
    assert last.graph_replays == 5


def test_a_sequence_tells_how_long_it_waited_for_its_first_step() -> None:
    # Each look at the clock is a second later: real time may pass between the two submissions as well.
    house = House("inproc://queue", max_num_seqs=1, clock=itertools.count().__next__)
    worker = house.worker()
    worker.send(submit(1, [1], 3), submit(2, [1], 3))
    house.turn()
    house.turn_until(house.is_empty)
    waited = {output.sequence_id: output.queue_seconds for output in worker.outputs()}
    house.close()
    assert 0 < waited[1] < waited[2]


@pytest.mark.parametrize("overlap", [False, True])
def test_at_debug_the_log_has_a_line_for_each_step(overlap: bool, caplog: pytest.LogCaptureFixture) -> None:
    own: House = House("inproc://debug", overlap=overlap, max_num_seqs=1, graph_replays=lambda: own.launched // 2)
    worker = own.worker()
    with caplog.at_level(logging.DEBUG, "persimmon"):
        worker.send(submit(1, [1, 2, 3, 4, 5], 2), submit(2, [6], 1))
        own.turn()
        own.finish()
    steps = last_stats(worker).steps
    own.close()
    lines = [vars(record)["fields"] for record in caplog.records if record.message == "step"]
    assert len(lines) == steps == 3
    assert all(line["ms"] > 0 and line["preemptions"] == 0 for line in lines)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [(line["decodes"], line["chunk_tokens"]) for line in lines] == [(0, 5), (1, 0), (0, 1)]
    assert [line["graph"] for line in lines] == [False, True, False]
    assert (lines[0]["running"], lines[0]["waiting"]) == (1, 1)
    assert lines[-1]["free_blocks"] == own.pool.num_blocks > lines[0]["free_blocks"]


def test_above_debug_the_log_has_no_line_for_a_step(house: House, caplog: pytest.LogCaptureFixture) -> None:
    worker = house.worker()  # while it is referred to, it stays connected
    with caplog.at_level(logging.INFO, "persimmon"):
        worker.send(submit(1, [1, 2, 3], 2))
        house.turn()
        house.finish()
    assert not caplog.records
