"""Sequences that must be prepared before they run."""

import threading
from concurrent.futures import Future
from typing import ClassVar

import pytest

from persimmon.server.engine.messages import Abort, Submit
from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.step_runner import NoRoomError
from tests.server.engine.engine_turns import House, submit, tokens_of
from tests.server.engine.fake_model import generate_alone


class TestPreparation:
    """Sequences with a prompt of five tokens wait for a future that the test completes."""

    PROMPT: ClassVar = [1, 2, 0, 1, 1]

    @pytest.fixture
    def prepared(self, house: House) -> Future[None]:
        return house.preparations.setdefault(5, Future())

    def test_holds_up_nobody_else(self, house: House, prepared: Future[None]) -> None:
        worker = house.worker()
        worker.send(submit(1, self.PROMPT, 3), submit(2, [2], 3))
        house.turn()
        house.finish()
        assert tokens_of(worker.outputs(), 2) == generate_alone([2], 3)[0]
        prepared.set_result(None)
        house.engine.turn()
        house.finish()
        assert tokens_of(worker.outputs(), 1) == generate_alone(self.PROMPT, 3)[0]

    def test_wakes_the_engine_when_it_ends(self, house: House, prepared: Future[None]) -> None:
        worker = house.worker()
        worker.send(submit(1, self.PROMPT, 3))
        house.turn()
        # From another thread, while this one waits in the engine's turn with nothing to do.
        thread = threading.Thread(target=prepared.set_result, args=(None,))
        thread.start()
        house.engine.turn()
        thread.join()
        house.finish()
        assert tokens_of(worker.outputs(), 1) == generate_alone(self.PROMPT, 3)[0]

    def test_that_fails_ends_its_sequences_alone(self, house: House, prepared: Future[None]) -> None:
        worker = house.worker()
        worker.send(Submit(sequence_id=1, samples=2, token_ids=self.PROMPT, max_tokens=3), submit(3, [2], 3))
        house.turn()
        prepared.set_exception(ValueError("no text fits it"))
        house.engine.turn()
        house.finish()
        outputs = worker.outputs()
        errors = {output.sequence_id: output.error for output in outputs if output.finish_reason == "error"}
        assert errors == dict.fromkeys((1, 2), "no text fits it")
        assert tokens_of(outputs, 3) == generate_alone([2], 3)[0]

    def test_that_finds_no_room_ends_its_sequences_as_expired(
        self, house: House, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Clients are asked to try again."""

        def no_room(house: House, sequence: Sequence) -> None:
            raise NoRoomError("too many images")

        monkeypatch.setattr(House, "prepare", no_room)
        worker = house.worker()
        worker.send(Submit(sequence_id=1, samples=2, token_ids=self.PROMPT, max_tokens=3))
        house.turn()
        endings = [(own.sequence_id, own.finish_reason, own.error) for own in worker.outputs()]
        assert endings == [(1, "expired", "too many images"), (2, "expired", "too many images")]
        assert house.is_empty()

    def test_of_an_aborted_sequence_starts_nothing(self, house: House, prepared: Future[None]) -> None:
        worker = house.worker()
        worker.send(Submit(sequence_id=1, samples=2, token_ids=self.PROMPT, max_tokens=3))
        house.turn()
        worker.send(Abort([1]))
        house.turn()
        prepared.set_result(None)
        house.engine.turn()
        house.finish()
        outputs = worker.outputs()
        assert tokens_of(outputs, 1) == []
        assert tokens_of(outputs, 2) == generate_alone(self.PROMPT, 3, sample_index=1)[0]
        assert house.is_empty()

    def test_may_end_after_its_worker_has_gone(self, house: House, prepared: Future[None]) -> None:
        worker, other = house.worker(), house.worker()
        worker.send(submit(1, self.PROMPT, 3))
        house.turn()
        worker.socket.close()
        other.send(submit(2, [2], 3))
        house.turn()
        house.finish()
        prepared.set_result(None)
        house.engine.turn()
        house.finish()
        assert tokens_of(other.outputs(), 2) == generate_alone([2], 3)[0]
        assert house.is_empty()
