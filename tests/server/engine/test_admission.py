"""Room for one more: from how long answers were, how the others grow, and what over-confidence has cost."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persimmon.server.engine.admission import REMEMBERED, Admission, AnswerLengths, Growing


def test_an_answer_is_expected_to_get_what_those_got_that_came_as_far() -> None:
    lengths = AnswerLengths(guess=5)
    for length in [20, 400] * REMEMBERED:
        lengths.add(length)
    assert lengths.remaining(0) == 210
    assert lengths.remaining(20) == 380
    assert lengths.remaining(390) == 10


def test_an_answer_that_is_longer_than_all_others_is_expected_to_become_half_as_long_again() -> None:
    assert AnswerLengths(guess=5).remaining(100) == 51


def test_a_guess_fades() -> None:
    lengths = AnswerLengths(guess=1000)
    assert lengths.remaining(0) == 1000
    for _ in range(REMEMBERED):
        lengths.add(7)
    assert lengths.remaining(0) == 7


@given(st.lists(st.integers(0, 50), max_size=3 * REMEMBERED), st.integers(0, 60))
def test_the_mean_is_that_of_the_latest_answers(added: list[int], so_far: int) -> None:
    lengths = AnswerLengths(guess=9)
    for length in added:
        lengths.add(length)
    latest = ([9] * (REMEMBERED // 8) + added)[-REMEMBERED:]
    longer = [length - so_far for length in latest if length > so_far]
    assert lengths.remaining(so_far) == (-(-sum(longer) // len(longer)) if longer else so_far // 2 + 1)


def admission(num_blocks: int = 100, typical_output: int = 64) -> Admission:
    return Admission(num_blocks, block_size=16, typical_output=typical_output)


def steps(admission: Admission, count: int, computed: int = 10) -> None:
    for _ in range(count):
        admission.step(computed)


def test_no_answer_is_expected_to_exceed_what_was_asked_for() -> None:
    assert admission().growing(prompt_length=6, output_length=10, max_tokens=30, blocks=2) == Growing(20, 2, 1)
    assert admission().growing(prompt_length=6, output_length=10, max_tokens=900, blocks=2) == Growing(54, 2, 3)


def test_alone_a_sequence_always_fits() -> None:
    assert admission().fits([], Growing(10_000, 90, 625), 1, free=0) == 1
    assert admission().fits([], Growing(10_000, 90, 625), 5, free=3) == 3


def test_a_prompt_without_blocks_for_all_of_it_does_not_fit() -> None:
    assert admission().fits([], Growing(1, 2, 1), 1, free=-1) == 0


def test_where_blocks_are_plenty_all_begin_together() -> None:
    assert admission().fits([Growing(64, 4, 4)] * 5, Growing(64, 4, 4), 5, free=50) == 5


def test_where_blocks_are_scarce_they_begin_in_turn() -> None:
    own = admission(num_blocks=40)
    running = [Growing(64, 4, 4)] * 4
    steps(own, 20)
    assert own.fits(running, Growing(64, 4, 4), 3, free=20) == 1
    assert own.fits(running, Growing(64, 4, 4), 3, free=20) == 0
    steps(own, 20)
    assert own.fits(running, Growing(64, 4, 4), 3, free=20) == 1


@pytest.mark.parametrize(("free", "fits"), [(9, 0), (10, 1)])
def test_half_of_the_expected_growth_must_be_free(free: int, fits: int) -> None:
    own = admission(num_blocks=40)
    steps(own, 100)
    # Five that need four blocks each at one time.
    assert own.fits([Growing(64, 4, 4)] * 4, Growing(64, 4, 4), 1, free) == fits


def test_blocks_of_those_who_end_before_count() -> None:
    own = admission(num_blocks=40)
    steps(own, 100)
    # The short one needs two blocks at the time when all others do, and leaves thirty to the long ones.
    running = [Growing(30, 30, 2), Growing(320, 4, 20)]
    assert own.fits(running, Growing(320, 2, 20), 1, free=5) == 1
    assert admission(40).fits([Growing(320, 34, 20)], Growing(320, 2, 20), 1, free=5) == 0


def test_who_loses_computed_tokens_becomes_careful() -> None:
    own = admission(num_blocks=40)
    steps(own, 100)
    own.lose(60)
    assert own.fits([Growing(64, 4, 4)] * 4, Growing(64, 4, 4), 1, free=19) == 0
    steps(own, 10_000)
    assert own.fits([Growing(64, 4, 4)] * 4, Growing(64, 4, 4), 1, free=11) == 1


def test_nobody_is_refused_for_ever() -> None:
    rng = Random(0)
    for _ in range(200):
        own = admission(num_blocks=200, typical_output=rng.choice([1, 50, 5000]))
        own.lose(rng.choice([0, 10**6]))
        steps(own, rng.randint(1, 50))
        assert own.fits([], Growing(rng.randint(1, 5000), rng.randint(1, 150), 9), 1, free=rng.randint(0, 50)) == 1
