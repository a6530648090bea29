import json
import random
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persimmon.model.chat_format import AnswerText
from persimmon.model.grammar import KINDS, GrammarCompiler, GrammarError, GrammarSpec
from tests.model.grammar_walks import (
    COMPILER,
    END_OF_TEXT,
    TOKENIZER,
    VOCAB_SIZE,
    WORDS,
    accepts,
    allowed,
    compile_json,
    random_answer,
    tokens_of,
)

SQL = """
root ::= select_statement

select_statement ::= "SELECT " column " from " table " where " condition

column ::= "col_1 " | "col_2 "

table ::= "table_1 " | "table_2 "

condition ::= column "= " number  # one of two

number ::= "1 " | "2 "
"""

CALCULATOR = """
%import common.INT
start: sum
?sum: product ("+" product)*
product: atom ("*" atom)~0..3
atom: INT | "(" sum ")" | [SIGN] NAME
SIGN: "-"
NAME: /[a-z]+/
%ignore / /
"""


def regex(text: str) -> GrammarSpec:
    return GrammarSpec("regex", text)


def choice(*choices: str) -> GrammarSpec:
    return GrammarSpec("choice", json.dumps(choices))


def refusal(spec: GrammarSpec) -> str:
    with pytest.raises(GrammarError) as caught:
        COMPILER.compile(spec)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


@given(
    choices=st.lists(st.text(st.sampled_from('ab é😀"\\\n'), min_size=1, max_size=6), min_size=1, max_size=6),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=60)
def test_masks_hold_exactly_the_tokens_that_lead_to_a_choice(choices: list[str], seed: int) -> None:
    rng = random.Random(seed)
    matcher = COMPILER.compile(choice(*choices))
    texts = [text.encode() for text in choices]
    answer = b""
    while not matcher.ended:
        leading = {
            token_id
            for token_id, word in enumerate(WORDS)
            if word and any(text.startswith(answer + word) for text in texts)
        }
        assert set(allowed(matcher)) == leading | ({END_OF_TEXT} if answer in texts else set())
        assert matcher.is_complete == (answer in texts)
        if not leading:
            break
        token_id = rng.choice(sorted(leading))
        answer += WORDS[token_id]
        matcher.consume(token_id)
    assert answer in texts
    assert allowed(matcher) == [END_OF_TEXT]


@pytest.mark.parametrize(
    ("pattern", "matching", "failing"),
    [
        ("[a-c]{2,3}", ["ab", "cba"], ["a", "abcd", "xy"]),
        ("^yes|no$", ["yes", "no"], ["yesno", "^yes"]),
        (r"\d+(\.\d\d)?", ["1", "12.50"], ["1.5", "١"]),
        (r"\w+@\w+\.com\n", ["ada@example.com\n"], ["ada@example.com", "é@example.com\n"]),
        ("a/b\\/c", ["a/b/c"], ["a\\/b"]),
        ("(?i)ok", ["OK", "ok", "oK"], ["o"]),
        (r"[\s\S]{3}", ["a b", "\n\té"], ["ab"]),
        ("é.", ["éé", "é😀"], ["é\n"]),
        ("a*", ["", "aaa"], ["b"]),
    ],
)
def test_an_answer_matches_a_regular_expression_as_a_whole(
    pattern: str, matching: list[str], failing: list[str]
) -> None:
    matcher = COMPILER.compile(regex(pattern))
    assert [text for text in matching if not accepts(matcher, text)] == []
    assert [text for text in failing if accepts(matcher, text)] == []


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("", "the regular expression is empty"),
        ("(", "unclosed group"),
        ("a\\", "ends in the middle of an escape"),
        ("(?=a)b", "look-around, .* not supported"),
        (r"(a)\1", "backreferences are not supported"),
        (r"\bfoo\b", "word boundaries .* not supported"),
        ("[^\\s\\S]", "no text matches it"),
        ("a" * 1025, "has 1025 bytes; at most 1024"),
    ],
)
def test_a_regular_expression_that_cannot_be_used_is_refused(pattern: str, complaint: str) -> None:
    assert refusal(regex(pattern)).startswith("the regular expression ")
    with pytest.raises(GrammarError, match=complaint):
        COMPILER.compile(regex(pattern))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '["a", 1]', '["a", ""]', "[", '["\\ud800"]', json.dumps(["a"] * 4097)]
)
def test_choices_that_are_no_list_of_strings_are_refused(text: str) -> None:
    assert refusal(GrammarSpec("choice", text)).startswith("the list of choices ")


def test_a_grammar_may_be_ebnf() -> None:
    matcher = COMPILER.compile(GrammarSpec("grammar", SQL))
    assert accepts(matcher, "SELECT col_2  from table_1  where col_1 = 2 ")
    assert not accepts(matcher, "SELECT col_3  from table_1  where col_1 = 2 ")


def test_a_grammar_may_be_larks() -> None:
    matcher = COMPILER.compile(GrammarSpec("grammar", CALCULATOR))
    assert accepts(matcher, "1+ (2*-abc)*7")
    assert not accepts(matcher, "1+")
    assert not accepts(matcher, "1*2*3*4*5")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (" ", "the grammar is empty"),
        ("foo: 'a'", "lexer error"),
        ('foo: "a"', "no start rule"),
        ("start: foo", 'unknown name: "foo"'),
        ('start: "a', "lexer error"),
        ('foo ::= "a"', "not valid EBNF: No 'root' rule"),
        ('root ::= ("a"', r"not valid EBNF: Expected '\)'"),
        ("root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "not valid EBNF"),
        ('start: a\na[stop="b"]: /[a-z]*/', r"options of rules"),
        ("start: a\na[lazy] : /[a-z]*/", r"options of rules"),
        ('start: "a" <[1]>', "tokens by name or number"),
        ('start: "a" <|ENDOFTEXT|>', "tokens by name or number"),
        ("start: @other", "other grammars"),
        ("start: A\nA: /a.*/ & /.*b/", "intersections"),
        ("start: A\nA: ~/a.*/", "negation"),
        ('start: a::0\na::_: "a" a::incr(_)', "parameters of rules"),
        ('%llguidance {"allow_invalid_utf8": true}\nstart: /a/', "%llguidance"),
        ('start: %json {"type": "object"}', "%json"),
        ('start: A\nA: %regex {"substring_chars": "abc"}', "%regex"),
        ("start: start", "no text matches it"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused(text: str, complaint: str) -> None:
    assert refusal(GrammarSpec("grammar", text)).startswith("the grammar ")
    with pytest.raises(GrammarError, match=complaint):
        COMPILER.compile(GrammarSpec("grammar", text))


def test_signs_within_strings_and_comments_of_a_grammar_mean_nothing() -> None:
    text = '# <1> @a & ~ ::\nstart: "<1> @a & ~ :: %json" /[<>@&~%]+/ // %regex'
    assert accepts(COMPILER.compile(GrammarSpec("grammar", text)), "<1> @a & ~ :: %json<>")


def test_kinds_that_do_not_exist_are_refused() -> None:
    assert str(KINDS) not in refusal(GrammarSpec("xml", "<a/>"))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_text_with_a_lone_surrogate_or_of_too_many_bytes_is_refused(kind: str) -> None:
    assert "lone surrogate" in refusal(GrammarSpec(kind, '"\ud800"'))  # type: ignore[arg-type]
    assert "at most" in refusal(GrammarSpec(kind, "x" * 1_050_000))  # type: ignore[arg-type]


def test_a_json_object_is_an_object_with_single_spaces_at_most() -> None:
    matcher = COMPILER.compile(GrammarSpec("json_object"))
    whole = ["{}", '{"a":[1,2.5e3,-0],"b":{"c":null}}', '{"a": [true, false], "é\\n": "\\"😀\\\\"}']
    assert [text for text in whole if not accepts(matcher, text)] == []
    wrong = ["[]", '"a"', "1", "", "{", '{"a":1', " {}", "{} ", "{ }", '{"a":  1}', '{"a":1 }', '{"a":\n1}', "{'a':1}"]
    assert [text for text in wrong if accepts(matcher, text)] == []


@given(seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=15)
def test_random_json_objects_parse(seed: int) -> None:
    answer = random_answer(COMPILER.compile(GrammarSpec("json_object")), random.Random(seed))
    assert answer is None or isinstance(json.loads(answer), dict)


def test_bytes_within_a_string_are_utf8() -> None:
    matcher = compile_json('{"type": "string"}')
    matcher.consume(WORDS.index(b'"'))
    singles = {token_id: word[0] for token_id, word in enumerate(WORDS) if len(word) == 1}
    first = {singles[token_id] for token_id in allowed(matcher) if token_id in singles}
    assert not first & {*range(0x20), 0x7F, *range(0x80, 0xC2), *range(0xF5, 0x100)}
    assert {0xC2, 0xE0, 0xED, 0xF0, 0xF4} <= first
    # After the first byte come only those that complete a character; ED A0 would begin a surrogate.
    for lead, lowest, highest in [(0xC3, 0x80, 0xBF), (0xE0, 0xA0, 0xBF), (0xED, 0x80, 0x9F), (0xF4, 0x80, 0x8F)]:
        begun = matcher.copy()
        begun.consume(WORDS.index(bytes([lead])))
        assert {WORDS[token_id][0] for token_id in allowed(begun)} == set(range(lowest, highest + 1))
        assert not begun.is_complete


@pytest.mark.parametrize("spec", [regex("(?s:.)*"), GrammarSpec("json_object"), GrammarSpec("json_schema", "{}")])
def test_only_tokens_of_text_are_allowed_and_end_of_text_at_the_end(spec: GrammarSpec) -> None:
    matcher = COMPILER.compile(spec)
    rng = random.Random(0)
    for _ in range(30):
        choices = allowed(matcher)
        assert all(WORDS[token_id] for token_id in choices if token_id != END_OF_TEXT)
        assert max(choices) < len(WORDS) < VOCAB_SIZE
        assert (END_OF_TEXT in choices) == matcher.is_complete
        matcher.consume(rng.choice(choices))
        if matcher.ended:
            break


def test_no_text_is_made_of_control_tokens_and_the_unknown_token() -> None:
    pieces = TOKENIZER.pieces(range(TOKENIZER.vocab_size))
    without_text = [piece for piece, word in zip(pieces, TOKENIZER.text_bytes(), strict=True) if not word]
    assert without_text == ["<unk>", "|ENDOFTEXT|"]


def test_masks_are_as_wide_as_the_vocabulary() -> None:
    mask = COMPILER.compile(GrammarSpec("json_object")).mask()
    assert mask.dtype == np.int32
    assert mask.shape == ((VOCAB_SIZE + 31) // 32,)


def test_an_ended_answer_allows_end_of_text_alone_and_stays_ended() -> None:
    matcher = COMPILER.compile(choice("a"))
    matcher.consume(WORDS.index(b"a"))
    assert matcher.ended
    assert matcher.is_complete
    for _ in range(2):
        assert allowed(matcher) == [END_OF_TEXT]
        matcher.consume(END_OF_TEXT)
        assert matcher.ended


def test_a_complete_answer_that_may_go_on_has_not_ended() -> None:
    matcher = COMPILER.compile(choice("a", "ab"))
    matcher.consume(WORDS.index(b"a"))
    assert matcher.is_complete
    assert not matcher.ended
    matcher.consume(END_OF_TEXT)
    assert matcher.ended


@pytest.mark.parametrize("token_id", [0, END_OF_TEXT, WORDS.index(b"b"), len(WORDS), VOCAB_SIZE, -1, 2**31])
def test_a_token_that_does_not_follow_is_an_error(token_id: int) -> None:
    with pytest.raises(GrammarError, match=f"token {token_id} does not follow|cannot be followed"):
        COMPILER.compile(choice("a")).consume(token_id)


@pytest.mark.parametrize(("ends", "at_the_end"), [([], []), ([1], [1]), ([5, 4099], [5, 4099])])
def test_a_model_may_have_no_end_of_text_or_several(ends: list[int], at_the_end: list[int]) -> None:
    compiler = GrammarCompiler.for_tokenizer(TOKENIZER, VOCAB_SIZE, ends)
    matcher = compiler.compile(choice("ab", "ac"))
    for token_id in tokens_of(b"ab"):
        assert token_id in allowed(matcher)
        matcher.consume(token_id)
    assert matcher.ended
    assert allowed(matcher) == at_the_end


def test_a_vocabulary_that_cannot_spell_an_answer_is_an_error_where_it_ends() -> None:
    compiler = GrammarCompiler([b"", b"a", b"b"], 3, [0])
    matcher = compiler.compile(choice("abc"))
    matcher.consume(1)
    matcher.consume(2)
    with pytest.raises(GrammarError, match="the list of choices cannot be followed"):
        matcher.mask()


@pytest.mark.parametrize(("words", "ends"), [([b"a", b"b"], []), ([b"a"], [1]), ([b"a"], [-1])])
def test_a_vocabulary_must_fit_the_model(words: list[bytes], ends: list[int]) -> None:
    with pytest.raises(ValueError, match="vocab_size of 1"):
        GrammarCompiler(words, 1, ends)


def test_copies_go_their_own_ways() -> None:
    matcher = COMPILER.compile(choice("ab", "ac"))
    matcher.consume(WORDS.index(b"a"))
    copy = matcher.copy()
    copy.consume(WORDS.index(b"b"))
    assert copy.ended
    assert not matcher.ended
    matcher.consume(WORDS.index(b"c"))
    assert matcher.ended


def test_copies_may_be_followed_in_threads() -> None:
    matcher = COMPILER.compile(GrammarSpec("json_object"))
    answers: dict[int, str | None] = {}

    def follow(seed: int) -> None:
        answers[seed] = random_answer(matcher.copy(), random.Random(seed), 60)

    threads = [threading.Thread(target=follow, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert answers[seed] == random_answer(matcher.copy(), random.Random(seed), 60)


@pytest.mark.parametrize(
    ("spec", "answer"),
    [
        (GrammarSpec("json_object"), '{"name": "Ada", "age": 36, "tags": ["math", "poetry"]}'),
        (GrammarSpec("json_object"), '{"name":"Ada","age":36,"tags":["math","poetry"]}'),
        (choice("yes", "no"), "yes"),
        (choice(" yes", "yes"), " yes"),
        (regex(" ?[a-z ]+"), " the end of the day"),
        (GrammarSpec("grammar", 'start: "the" " end"'), "the end"),
    ],
)
def test_in_chat_the_tokens_that_are_natural_after_the_label_are_allowed(spec: GrammarSpec, answer: str) -> None:
    prompt = TOKENIZER.encode("human: Who?\n\nadept:", add_bos=False)
    whole = TOKENIZER.encode(f"human: Who?\n\nadept: {answer}", add_bos=False)
    assert whole[: len(prompt)] == prompt
    matcher = COMPILER.compile(replace(spec, leading_space=True))
    text = ""
    for token_id in whole[len(prompt) :]:
        assert token_id in allowed(matcher)
        matcher.consume(token_id)
        text += TOKENIZER.decode([token_id])
    assert matcher.is_complete
    assert AnswerText().push(text) == answer


def test_in_chat_an_answer_begins_with_the_space_of_the_format() -> None:
    matcher = COMPILER.compile(replace(choice(" yes", "yes"), leading_space=True))
    assert {WORDS[token_id][:1] for token_id in allowed(matcher)} == {b" "}
    assert accepts(matcher, "  yes")
    assert not accepts(matcher, "yes")


def test_a_compiler_for_checking_agrees_with_that_of_a_model() -> None:
    checker = GrammarCompiler.for_checking()
    checker.check(GrammarSpec("json_schema", '{"type": "object", "properties": {"é": {"enum": ["😀"]}}}'))
    checker.check(GrammarSpec("grammar", CALCULATOR))
    with pytest.raises(GrammarError, match="unclosed group"):
        checker.check(regex("("))
    with pytest.raises(GrammarError, match="no text matches it"):
        checker.check(GrammarSpec("json_schema", '{"$ref": "#"}'))
