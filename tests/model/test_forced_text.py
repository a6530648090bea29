"""Text that a grammar forces, as guesses: tokens that the grammar allows, split as the model splits them."""

import json
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from persimmon.model.grammar import ForcedText, GrammarSpec
from tests.model.grammar_walks import COMPILER, END_OF_TEXT, WORDS, allowed, tokens_of
from tests.model.random_grammars import grammars

FRUIT = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "count": {"type": "integer"}, "ripe": {"type": "boolean"}},
    "required": ["name", "count", "ripe"],
}
MANY = 40


def forced_text(grammar: GrammarSpec) -> ForcedText:
    return COMPILER.compile_forced(grammar)


def of_fruit() -> ForcedText:
    return forced_text(GrammarSpec("json_schema", json.dumps(FRUIT)))


def text(token_ids: list[int]) -> str:
    return b"".join(WORDS[token_id] for token_id in token_ids).decode()


def guessed(forced: ForcedText, came: str = "") -> str:
    """What is forced after some more text, which came in tokens of one byte."""
    guesses, count = forced.guess(tokens_of(came.encode()), MANY)
    assert count == len(guesses)
    return text(guesses)


def test_text_without_a_choice_is_found_wherever_it_begins() -> None:
    forced = of_fruit()
    assert guessed(forced) == '{"name": "'
    assert guessed(forced, '{"name": "') == ""
    assert guessed(forced, 'a fig"') == ', "count":'
    assert guessed(forced, ', "count": ') == ""
    assert guessed(forced, "7,") == ' "ripe":'
    assert guessed(forced, ' "ripe": t') == "rue}"


def test_the_last_text_of_an_answer_is_found_and_its_end_is_not_guessed() -> None:
    forced = forced_text(GrammarSpec("choice", '["yes", "no"]'))
    assert guessed(forced) == ""
    assert guessed(forced, "y") == "es"
    assert forced.guess(tokens_of(b"es"), MANY) == ([], 0)


def test_an_answer_that_may_end_or_go_on_is_not_forced() -> None:
    assert guessed(forced_text(GrammarSpec("regex", "a(bc)?")), "a") == ""


def test_spaces_between_items_are_expected_as_the_answer_has_them() -> None:
    forced = of_fruit()
    assert guessed(forced) == '{"name": "'
    assert guessed(forced, '{"name":"fig",') == '"count":'
    assert guessed(forced, '"count":7, ') == '"ripe":'
    assert guessed(forced, '"ripe": ') == ""


def test_tokens_are_as_long_as_they_can_be() -> None:
    guesses, _ = of_fruit().guess([], MANY)
    left = b'{"name": "'
    for token_id in guesses:
        assert len(WORDS[token_id]) == max(len(word) for word in WORDS if left.startswith(word))
        left = left[len(WORDS[token_id]) :]
    assert not left


def test_no_more_tokens_are_guessed_than_asked_for() -> None:
    guesses, count = of_fruit().guess([], 2)
    assert (len(guesses), count) == (2, 2)


def test_guesses_of_others_are_kept_as_far_as_they_spell_what_is_forced() -> None:
    others = tokens_of(b'{"na')
    guesses, count = of_fruit().guess([], MANY, others)
    assert guesses[: len(others)] == others
    assert text(guesses) == '{"name": "'
    assert count == len(guesses)
    guesses, _ = of_fruit().guess([], MANY, tokens_of(b'{"number": 1'))
    assert guesses[:3] == tokens_of(b'{"n')
    assert text(guesses) == '{"name": "'


def test_guesses_of_others_may_go_on_where_nothing_is_forced() -> None:
    others = tokens_of(b'{"name": "fig"')
    assert of_fruit().guess([], MANY, others) == (others, len('{"name": "'))


def test_guesses_of_others_without_forced_text_are_left_alone() -> None:
    forced = of_fruit()
    assert forced.guess(tokens_of(b'{"name": "'), MANY, tokens_of(b"fig")) == ([], 0)


def test_what_an_answer_cannot_go_on_with_ends_the_guesses() -> None:
    forced = of_fruit()
    assert forced.guess([*tokens_of(b"["), END_OF_TEXT], MANY) == ([], 0)
    assert forced.guess(tokens_of(b","), MANY) == ([], 0)


def test_an_unfinished_character_is_left_out() -> None:
    forced = forced_text(GrammarSpec("choice", '["aé1", "aè1"]'))
    guesses, _ = forced.guess([], MANY)
    assert text(guesses) == "a"
    assert forced.guess(tokens_of("aé".encode()[:2]), MANY) == ([], 0)
    assert text(forced.guess(tokens_of("é".encode()[1:]), MANY)[0]) == "1"


def test_copies_go_their_own_ways() -> None:
    forced = forced_text(GrammarSpec("choice", '["ab", "cd"]'))
    one, other = forced.copy(), forced.copy()
    assert guessed(one, "a") == "b"
    assert guessed(other, "c") == "d"


@given(grammar=grammars, seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=40)
def test_forced_tokens_follow_the_grammar_and_leave_no_choice_but_a_space(grammar: GrammarSpec, seed: int) -> None:
    rng = random.Random(seed)
    matcher, forced = COMPILER.compile(grammar), forced_text(grammar)
    came: list[int] = []
    for _ in range(25):
        guesses, count = forced.guess(came, MANY)
        assert count == len(guesses)
        ahead = matcher.copy()
        for token_id in guesses:
            ahead.consume(token_id)
        choices = allowed(matcher)
        if guesses:
            first_bytes = {WORDS[token_id][:1] for token_id in choices}
            assert len(first_bytes - {b" "}) <= 1
        came = [rng.choice(choices)]
        if came == [END_OF_TEXT]:
            break
        matcher.consume(came[0])
