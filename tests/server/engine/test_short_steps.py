"""Which clients short steps are for, and how much time they get."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.shares import Share
from persimmon.server.engine.short_steps import MAX_SHORT_STEPS, SHORT_SHARE, ShortSteps, clients_with_little

FEW, MANY, HEAVY = Share("few"), Share("many"), Share("heavy", weight=9)


def running(**counts: int) -> list[Sequence]:
    shares = {"few": FEW, "many": MANY, "heavy": HEAVY}
    sequences: list[Sequence] = []
    for name, count in counts.items():
        for _ in range(count):
            sequences.append(Sequence(len(sequences), [0], 1))
            sequences[-1].share = shares[name]
    return sequences


@pytest.mark.parametrize(
    ("runs", "waits", "clients"),
    [
        ({"many": 9, "few": 1}, {MANY: 9}, {FEW}),
        ({"many": 9}, {MANY: 9, FEW: 1}, {FEW}),
        ({"few": 1}, {MANY: 9}, {FEW}),  # all that ran for the other client have ended with the last step
        ({"many": 9, "few": 1}, {FEW: 1}, set()),
        ({"many": 5, "few": 5}, {MANY: 1, FEW: 1}, set()),
        ({"many": 9}, {MANY: 9}, set()),
        ({"heavy": 8, "few": 1}, {HEAVY: 1}, set()),
        ({"heavy": 9, "few": 2}, {FEW: 9}, {HEAVY}),
    ],
)
def test_short_steps_are_for_clients_with_less_than_their_part_while_another_wants_more(
    runs: dict[str, int], waits: dict[Share, int], clients: set[Share]
) -> None:
    assert clients_with_little(running(**runs), waits) == clients


@given(st.lists(st.floats(1e-4, 0.1), max_size=40))
def test_short_steps_end_with_their_time_or_their_number(seconds: list[float]) -> None:
    short_steps = ShortSteps()
    assert short_steps.seconds == 0
    short_steps.count_full(0.2, longest=None)
    taken = []
    for own in seconds:
        if own > short_steps.seconds:
            break
        short_steps.count_short(own)
        taken.append(own)
    assert sum(taken) <= SHORT_SHARE * 0.2 * (1 + 1e-9)
    assert len(taken) <= MAX_SHORT_STEPS
    short_steps.count_full(0.2, longest=None)
    assert short_steps.seconds == SHORT_SHARE * 0.2


def test_a_limit_on_the_time_between_tokens_leaves_less() -> None:
    short_steps = ShortSteps()
    short_steps.count_full(0.2, longest=0.21)
    assert short_steps.seconds == pytest.approx(0.01)
    short_steps.count_full(0.2, longest=0.1)
    assert short_steps.seconds <= 0
