"""Grammars that would take too much time or memory without limits."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from persimmon.model.grammar import GrammarError, GrammarSpec, Matcher
from persimmon.model.grammar.schema_reader import MAX_PROPERTIES
from tests.model.grammar_walks import COMPILER, WORDS, allowed, compile_json, random_answer


def nested(levels: int, wrap: Callable[[Any], Any], inner: Any = True) -> Any:
    for _ in range(levels):
        inner = wrap(inner)
    return inner


def chain(length: int, link: Callable[[Any], Any]) -> Any:
    """Definitions of which each refers to the next."""
    definitions = {str(number): link({"$ref": f"#/$defs/{number + 1}"}) for number in range(length)}
    return {"$ref": "#/$defs/0", "$defs": {**definitions, str(length): {"type": "object"}}}


def objects(count: int, of: Any = True, **keywords: Any) -> Any:
    return {"type": "object", "properties": {f"p{number}": of for number in range(count)}, **keywords}


def names(count: int) -> list[str]:
    return [f"p{number}" for number in range(count)]


def refused_schemas() -> dict[str, Any]:
    patterns = {f"^p{number}$": True for number in range(1000)}
    anywhere = [{"type": "string", "pattern": f"x{number}.*y{number}"} for number in range(30)]
    return {
        "deep text": nested(70, lambda inner: {"items": inner}),
        "a long chain of references": chain(900, lambda ref: {"allOf": [{"anyOf": [ref]}]}),
        "a chain of references that doubles": chain(18, lambda ref: objects(2, {**ref, "minProperties": 0})),
        "a chain of references that doubles in arrays": chain(
            20, lambda ref: {"type": "array", "prefixItems": [{"allOf": [ref, {"minItems": 1}]}] * 2}
        ),
        "copies of a large schema for required names": {
            "type": "object",
            "required": names(1000),
            "additionalProperties": objects(300, {"type": "integer"}),
        },
        "copies of a large schema for listed names": {
            "allOf": [objects(1000), {"type": "object", "additionalProperties": objects(300)}]
        },
        "copies of a large schema for items": {
            "allOf": [{"type": "array", "prefixItems": [True] * 1000}, {"type": "array", "items": objects(300)}]
        },
        "alternatives times alternatives": {
            "allOf": [{"anyOf": [objects(1, required=[f"k{i}{j}"]) for j in range(15)]} for i in range(4)]
        },
        "patterns times patterns": {"allOf": [{"anyOf": anywhere[:12]}] * 4},
        "a conjunction of many patterns": {"allOf": anywhere},
        "many patternProperties": {"type": "object", "patternProperties": patterns},
        "many properties": objects(5000),
        "many required names": {"type": "object", "required": names(6000)},
        "all ways to leave properties out": objects(400, minProperties=1, additionalProperties=False),
        "many objects in an enum": {"enum": [[[[number]]] for number in range(5000)]},
        "a large object as a literal": {"const": dict.fromkeys(names(4500), 1)},
        "remainders of a large number": {"type": "integer", "multipleOf": 16777213},
        "the least common multiple": {"allOf": [{"type": "integer", "multipleOf": factor} for factor in (7, 11, 13)]},
        "alternatives of oneOf that are all compared": {"oneOf": [objects(1, required=[f"k{i}"]) for i in range(200)]},
        "copies of a large definition to close": {
            "properties": {"z": True},
            "anyOf": [{"$ref": "#/$defs/a"}] * 900,
            "$defs": {"a": objects(900)},
        },
        "alternatives within alternatives to close": {
            "properties": {"z": True},
            "anyOf": [
                {**objects(1), "anyOf": [objects(30, required=[f"k{i}{j}"]) for j in range(30)]} for i in range(30)
            ],
        },
        "recursion on both sides": {
            "allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
            "$defs": {name: objects(1, {"$ref": f"#/$defs/{name}"}) for name in "ab"},
        },
    }


REFUSED = {
    **{name: GrammarSpec("json_schema", json.dumps(schema)) for name, schema in refused_schemas().items()},
    "deeper text than Python reads": GrammarSpec("json_schema", '{"items":' * 6000 + "{}" + "}" * 6000),
    "brackets without an end": GrammarSpec("json_schema", "[" * 60_000),
    "a number of many digits": GrammarSpec("json_schema", '{"minimum": ' + "9" * 5000 + "}"),
    "deep choices": GrammarSpec("choice", "[" * 60_000),
    "a regular expression of optional parts": GrammarSpec("regex", ".?" * 20_000),
    "optional parts within the limit, repeated": GrammarSpec("regex", f"({'.?' * 500})*"),
    "deep brackets in a regular expression": GrammarSpec("regex", "(" * 500 + "a" + ")" * 500),
    "a long chain of rules": GrammarSpec(
        "grammar", "start: a0\n" + "".join(f'a{i}: a{i + 1} | "x"\n' for i in range(700)) + 'a700: "x"'
    ),
    "chained rules with deep brackets": GrammarSpec(
        "grammar", "start: a0\n" + "".join(f"a{i}: {'(' * 25}a{i + 1}{')' * 25}\n" for i in range(199)) + 'a199: "x"'
    ),
    "a terminal that doubles": GrammarSpec(
        "grammar", "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(60)) + "A60: /.?/"
    ),
    "a terminal that doubles in what is ignored": GrammarSpec(
        "grammar", 'start: "x"\n%ignore A0\n' + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(60)) + "A60: /.?/"
    ),
    "brackets in EBNF": GrammarSpec("grammar", "root ::= " + "(" * 7000 + '"a"' + ")" * 7000),
    "rules in EBNF": GrammarSpec(
        "grammar", "root ::= a0\n" + "".join(f"a{i} ::= a{i + 1}\n" for i in reversed(range(700))) + 'a700 ::= "x"'
    ),
    "rules that number their uses": GrammarSpec(
        "grammar",
        'start: p::0x0\np::_: "" %if is_ones([0:40])\n'
        + "".join(f'  | "a" p::set_bit({i}) %if bit_clear({i})\n' for i in range(40)),
    ),
}

FOLLOWED_SCHEMAS = {
    "names that are listed within names that are listed": nested(
        8,
        lambda inner: {"type": "object", "propertyNames": {"enum": names(40)}, "additionalProperties": inner},
        {"type": "null"},
    ),
    "many labelled values": {"oneOf": [{"const": number, "title": f"value {number}"} for number in range(4000)]},
    "counts without end": {"type": "array", "items": {"type": "string", "maxLength": 10**9}, "minItems": 10**9},
    "counts within counts": nested(
        10, lambda inner: {"type": "array", "items": inner, "minItems": 12345, "maxItems": 54321}
    ),
    "repetitions of repetitions": {"type": "string", "pattern": "^((a{1000}){1000}){1000}$"},
    "an automaton of many states": {"type": "string", "pattern": "^(a|b)*a(a|b){25}$"},
    "patterns of many states": {"type": "string", "pattern": "a.{100}b.{100}c.{100}$"},
    "recursion without an end": {
        "$ref": "#/$defs/a",
        "$defs": {"a": objects(1, {"$ref": "#/$defs/a"}, required=["p0"])},
    },
    "alternatives that all begin alike": {"anyOf": [{"minLength": i, "minItems": i, "minimum": i} for i in range(900)]},
    "a large enum": {"enum": [f"value-{number:05}" for number in range(4000)]},
    "a large literal": {"const": list(range(9000))},
    "many bounds": objects(700, {"type": "number", "minimum": -12345.678, "maximum": 98765.4321}),
}

FOLLOWED = {
    **{name: GrammarSpec("json_schema", json.dumps(schema)) for name, schema in FOLLOWED_SCHEMAS.items()},
    "an ambiguous grammar": GrammarSpec("grammar", 'start: a\na: a a | a a a | a a a a | "x" | '),
    "nothing in many ways": GrammarSpec("grammar", 'start: s*\ns: t* t* t* t*\nt: u* u* u*\nu: "x"? "y"? "x"?'),
    "repetitions of rules": GrammarSpec("grammar", 'start: (a{1,999999} "b"?){1,999999}\na: "x" | "xx"'),
    "rules that double": GrammarSpec(
        "grammar", "start: a0\n" + "".join(f"a{i}: a{i + 1} a{i + 1}\n" for i in range(60)) + 'a60: "x"'
    ),
    "right recursion": GrammarSpec("grammar", 'start: "x" start | "x"'),
    "alternatives in a loop": GrammarSpec("regex", "(a.{0,40}b|c.{0,41}d|e.{0,42}f)*z"),
    "many choices": GrammarSpec("choice", json.dumps([f"choice {number}" for number in range(4000)])),
}


@pytest.mark.parametrize("spec", REFUSED.values(), ids=REFUSED)
def test_a_grammar_that_would_take_too_much_is_refused(spec: GrammarSpec) -> None:
    with pytest.raises(GrammarError) as caught:
        COMPILER.compile(spec)
    assert "fails on it" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("spec", FOLLOWED.values(), ids=FOLLOWED)
def test_a_grammar_that_takes_much_step_by_step_is_followed_or_given_up(spec: GrammarSpec) -> None:
    matcher = COMPILER.compile(spec)
    message = "is followed"
    try:
        random_answer(matcher, random.Random(0), 60)
    except GrammarError as error:
        message = str(error)
    assert message == "is followed" or message.endswith("cannot be followed: it is too complex")


def test_an_answer_that_is_given_up_stays_given_up_and_its_copies_go_on() -> None:
    matcher = COMPILER.compile(FOLLOWED["nothing in many ways"])
    copy = matcher.copy()
    follow = WORDS.index(b"x")
    for _ in range(2):
        with pytest.raises(GrammarError, match="it is too complex"):
            consume_many(matcher, follow)
        with pytest.raises(GrammarError, match="it is too complex"):
            matcher.mask()
        assert not matcher.ended
        assert not matcher.is_complete
    assert follow in allowed(copy)
    copy.consume(follow)


def consume_many(matcher: Matcher, token_id: int) -> None:
    for _ in range(300):
        matcher.consume(token_id)


@pytest.mark.parametrize(
    "schema",
    [
        objects(MAX_PROPERTIES, {"type": "string"}),
        objects(400, {"type": "string", "format": "email"}, required=names(400), additionalProperties=False),
        nested(30, lambda inner: objects(1, inner)),
        chain(15, lambda ref: objects(3, ref)),
        {"oneOf": [objects(1, {"const": str(number)}, required=["p0"]) for number in range(200)]},
        {"allOf": [objects(60, {"enum": ["a", "b"]}), {"type": "object", "properties": {"q": {"type": "integer"}}}]},
        {"allOf": [{"$ref": "#/$defs/base"}, objects(20, required=["p1"])], "$defs": {"base": objects(40)}},
        {**objects(20, {"type": "string"}), "anyOf": [{"required": [name]} for name in names(20)]},
        {"type": "object", "patternProperties": {f"^x{number}_": {"type": "string"} for number in range(16)}},
        objects(30, {"type": "string", "pattern": "^[A-Z]{2}[0-9]{2}[A-Z0-9]{1,30}$", "maxLength": 34}),
    ],
)
def test_large_schemas_of_the_usual_kinds_compile(schema: Any) -> None:
    compile_json(json.dumps(schema))
