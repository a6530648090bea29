"""Steps that overlap: the next is planned while the one before it runs."""

import pytest

from tests.server.engine.fake_model import generate_alone
from tests.server.engine.simulation import Simulation


class TestOverlap:
    """A step is planned while the one before it runs, and the tokens of that one are not known yet."""

    @staticmethod
    def simulation(num_blocks: int = 40) -> Simulation:
        return Simulation(num_blocks=num_blocks, block_size=4, max_model_len=40, overlap=True)

    def test_a_sequence_goes_on_from_a_token_that_is_being_sampled(self) -> None:
        simulation = self.simulation()
        first, second = simulation.add([0, 1], 5), simulation.add([2, 2], 5)
        simulation.plan()
        plan = simulation.plan()
        assert [(item.sequence, item.start, item.pending_row) for item in plan.scheduled] == [
            (first, 2, 0),
            (second, 2, 1),
        ]
        simulation.drain()

    def test_the_last_token_that_the_limit_allows_is_known_ahead(self) -> None:
        simulation = self.simulation()
        simulation.add([0, 1], 3)
        for _ in range(3):
            assert simulation.step().num_tokens > 0
        assert simulation.step().num_tokens == 0, "the third token ends it"
        assert simulation.stats.steps == 3

    def test_a_stop_drops_the_one_token_after_it_and_its_blocks_are_free_a_step_later(self) -> None:
        simulation = self.simulation()
        answer, _ = generate_alone([0, 1], 30)
        sequence = simulation.add([0, 1], 30, [answer[0]])
        simulation.plan()
        simulation.plan()
        simulation.commit()
        assert sequence.finish_reason == "stop"
        assert simulation.pool.num_free < simulation.pool.num_blocks
        assert simulation.commit() == []
        assert simulation.pool.num_free == simulation.pool.num_blocks
        assert sequence.token_ids == [0, 1, answer[0]]
        assert simulation.stats.generated_tokens == 1

    def test_a_draw_that_depends_on_the_token_before_waits_for_it(self) -> None:
        simulation = self.simulation()
        simulation.add([0, 1], 9)
        penalized = simulation.add([2, 2], 2, penalized=True)
        simulation.plan()
        assert simulation.try_plan() is None
        simulation.commit()
        simulation.step()
        simulation.step()
        assert penalized.finished
        assert simulation.try_plan() is not None, "steps overlap again when no other sequence depends on it"
        simulation.drain()

    def test_nobody_is_preempted_while_a_step_may_write_their_blocks(self) -> None:
        simulation = self.simulation(num_blocks=10)
        for token in range(3):
            simulation.add([token] * 4, 30)
        simulation.plan()
        while (plan := simulation.try_plan()) is not None:
            assert plan.scheduled
            assert simulation.stats.preemptions == 0
            simulation.commit()
        simulation.commit()
        simulation.plan()
        assert simulation.stats.preemptions > 0
        simulation.drain()

    def test_a_failed_step_ends_its_sequences_and_the_step_after_it_goes_on_for_the_others(self) -> None:
        simulation = self.simulation()
        failed = simulation.add([0, 1], 5)
        simulation.plan()
        newcomer = simulation.add([2, 2], 5)
        simulation.plan()
        simulation.fail()
        assert (failed.finish_reason, newcomer.finish_reason) == ("abort", None)
        assert [advance.sequence for advance in simulation.commit()] == [newcomer]
        simulation.drain()
        assert list(simulation.finished.values()) == [newcomer]

    def test_a_plan_that_does_not_know_of_the_step_under_way_is_refused(self) -> None:
        simulation = self.simulation()
        simulation.add([0, 1], 5)
        simulation.plan()
        with pytest.raises(ValueError, match="a step is running"):
            simulation.scheduler.plan()
