import pytest
from hypothesis import given
from hypothesis import strategies as st

from persimmon.server.http.generation.stop_strings import StopChecker, StopStrings

LETTERS = "ab\n"
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=6), max_size=4)
DELTAS = st.lists(st.text(LETTERS, max_size=5), max_size=12)


def first_match(text: str, stops: list[str]) -> int | None:
    """Where the match begins that is complete first; of those complete at once, the one that began first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts)
    return None


@given(STOPS, DELTAS)
def test_what_comes_out_is_the_text_before_the_match_for_any_split(stops: list[str], deltas: list[str]) -> None:
    text = "".join(deltas)
    start = first_match(text, stops)
    checker = StopChecker(StopStrings(stops))
    out = ""
    taken = ""
    for delta in deltas:
        out += checker.push(delta)
        taken += delta
        known = text if start is None else text[:start]
        assert known.startswith(out)
        assert checker.matched == (first_match(taken, stops) is not None)
        if not checker.matched:
            assert out + checker.held == taken
    out += checker.finish()
    assert out == (text if start is None else text[:start])
    assert checker.matched == (start is not None)


@given(STOPS, DELTAS)
def test_held_back_is_the_longest_end_that_begins_a_stop_string(stops: list[str], deltas: list[str]) -> None:
    checker = StopChecker(StopStrings(stops))
    text = ""
    for delta in deltas:
        checker.push(delta)
        text += delta
        if checker.matched:
            assert checker.held == ""
            return
        beginnings = [stop[:length] for stop in stops for length in range(1, len(stop))]
        assert checker.held == max((end for end in beginnings if text.endswith(end)), key=len, default="")


@given(STOPS, st.text(LETTERS, max_size=30))
def test_every_split_gives_the_same_text(stops: list[str], text: str) -> None:
    strings = StopStrings(stops)
    whole, single = StopChecker(strings), StopChecker(strings)
    assert whole.push(text) + whole.finish() == "".join(map(single.push, text)) + single.finish()


def test_nothing_is_held_without_stop_strings() -> None:
    checker = StopChecker(StopStrings([]))
    assert checker.push("any text") == "any text"
    assert checker.held == ""
    assert not checker.matched


def test_of_matches_that_are_complete_at_once_the_longest_wins() -> None:
    checker = StopChecker(StopStrings(["c", "abc", "bc"]))
    assert checker.push("xxabcabc") == "xx"
    assert checker.matched


def test_a_match_that_is_complete_first_wins_over_one_that_began_first() -> None:
    checker = StopChecker(StopStrings(["abcd", "bc"]))
    assert checker.push("abcd") == "a"


def test_nothing_comes_out_after_a_match() -> None:
    checker = StopChecker(StopStrings(["stop"]))
    assert checker.push("go st") + checker.push("op and on") == "go "
    assert checker.push("more") + checker.finish() == ""


def test_a_stop_string_that_overlaps_itself_is_found() -> None:
    checker = StopChecker(StopStrings(["aab"]))
    assert "".join(map(checker.push, "aaaab")) == "aa"
    assert checker.matched


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])
