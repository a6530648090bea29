"""Submissions wait in turns, and those of aborted sequences are found."""

import pytest

from persimmon.server.engine.intake import Intake, Submission
from persimmon.server.engine.messages import Submit


def submission(number: int, owner: str, samples: int = 1) -> Submission:
    return Submission(b"worker", Submit(sequence_id=number, token_ids=[1], max_tokens=1, samples=samples, owner=owner))


def test_a_submission_does_not_wait_behind_all_of_another_client() -> None:
    intake = Intake()
    many = [submission(number, "many") for number in range(1000)]
    few = submission(1000, "few")
    for own in (*many, few):
        intake.put(own)
    assert [intake.take() for _ in range(4)] == [many[0], few, *many[1:3]]


def test_a_submission_that_is_withdrawn_is_not_taken() -> None:
    intake = Intake()
    first, second = submission(0, "few", samples=3), submission(3, "few")
    intake.put(first)
    intake.put(second)
    assert intake.withdraw((b"other", 1)) is None
    assert intake.withdraw((b"worker", 2)) is first
    assert intake.withdraw((b"worker", 0)) is None
    assert intake.take() is second
    assert not intake
    with pytest.raises(IndexError):
        intake.take()


def test_an_intake_is_empty_when_all_submissions_are_withdrawn() -> None:
    intake = Intake()
    intake.put(submission(0, "few"))
    intake.withdraw((b"worker", 0))
    assert not intake
