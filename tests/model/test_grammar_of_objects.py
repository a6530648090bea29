"""Which properties an object may have, and which of several schemas an answer follows."""

import json
import random
from typing import Any

import jsonschema
import pytest

from persimmon.model.grammar import GrammarError, GrammarSpec
from tests.model.grammar_walks import COMPILER, accepts, compile_json, random_answer

NULL = {"type": "null"}


def listing(*names: str, required: bool = False, **more: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict.fromkeys(names, NULL),
        **({"required": [*names]} if required else {}),
    } | more


def objects(*sets: str) -> list[str]:
    """Objects with properties of one letter each."""
    return [json.dumps(dict.fromkeys(names), separators=(",", ":")) for names in sets]


BASE = {
    "$defs": {"base": listing("a"), "either": {"anyOf": [listing("a", required=True), listing("b", required=True)]}}
}


@pytest.mark.parametrize(
    ("schema", "closed", "opened"),
    [
        (listing("a"), ["", "a"], ["x", "ax"]),
        ({"type": "object", "properties": {}}, [""], ["x"]),
        ({"properties": {"a": NULL}}, ["", "a"], ["x"]),
        ({"type": "object", "patternProperties": {"^p": NULL}}, ["", "p"], ["x", "px"]),
        (listing("a", required=False) | {"required": ["b"]}, ["b", "ab"], ["bx"]),
        ({**BASE, "$ref": "#/$defs/base", "description": "says nothing"}, ["a"], ["ax"]),
        ({**BASE, "allOf": [{"$ref": "#/$defs/base"}]}, ["a"], ["ax"]),
        ({**BASE, "allOf": [{"$ref": "#/$defs/base"}, listing("b")]}, ["", "ab"], ["abx"]),
        ({**BASE, **listing("b"), "$ref": "#/$defs/base"}, ["", "b"], ["bx"]),
        ({**BASE, **listing("b"), "allOf": [{"$ref": "#/$defs/base"}]}, ["", "b"], ["bx"]),
        ({**BASE, "anyOf": [{"$ref": "#/$defs/base"}, NULL]}, ["", "a"], ["ax"]),
        ({**BASE, **listing("c"), "allOf": [{"$ref": "#/$defs/either"}]}, ["ca", "cb"], ["cax"]),
        (
            {**listing("a"), "anyOf": [listing("b", required=True), {"required": ["c"]}]},
            ["ab", "b", "ac", "c"],
            ["abc", "cx"],
        ),
        (
            {"allOf": [{"anyOf": [listing("a", required=True), listing("b", required=True)]}, listing("c")]},
            ["a", "ac", "bc"],
            ["acb", "ax"],
        ),
        (
            {"allOf": [{"anyOf": [listing("a", required=True), listing("b", required=True)]}] * 1
             + [{"anyOf": [listing("c", required=True), listing("d", required=True)]}]},
            ["ac", "bd"],
            ["acx"],
        ),
        ({"items": listing("a"), "type": "array", "minItems": 1}, [], []),
    ],
)  # fmt: skip
def test_objects_that_list_properties_are_closed_unless_an_option_opens_them(
    schema: dict[str, Any], closed: list[str], opened: list[str]
) -> None:
    text = json.dumps(schema)
    for additional_properties, valid, invalid in ((False, closed, opened), (True, closed + opened, [])):
        begin = COMPILER.compile(GrammarSpec("json_schema", text, additional_properties=additional_properties))
        assert [each for each in objects(*valid) if not accepts(begin, each)] == []
        assert [each for each in objects(*invalid) if accepts(begin, each)] == []


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        listing("a", additionalProperties=True),
        listing("a", additionalProperties={}),
        listing("a", unevaluatedProperties=True),
        {"allOf": [listing("a", additionalProperties=True), listing("b")]},
        {**listing("a"), "anyOf": [{"type": "object", "additionalProperties": NULL}]},
    ],
)
def test_a_schema_opens_its_objects(schema: dict[str, Any]) -> None:
    assert accepts(compile_json(json.dumps(schema)), '{"x":null}')


def test_a_schema_that_lists_all_values_is_not_closed() -> None:
    schema = {**listing("a"), "enum": [{"a": None, "x": None}, {}]}
    assert accepts(compile_json(json.dumps(schema)), '{"a":null,"x":null}')


def test_closed_objects_within_closed_objects_keep_their_own_properties() -> None:
    schema = {
        **BASE,
        "properties": {"n": {"$ref": "#/$defs/base"}, "m": {"allOf": [{"$ref": "#/$defs/base"}, listing("b")]}},
    }
    begin = compile_json(json.dumps(schema))
    assert accepts(begin, '{"n":{"a":null},"m":{"a":null,"b":null}}')
    assert not accepts(begin, '{"n":{"a":null,"b":null}}')


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        (listing("a", unevaluatedProperties=False), ["", "a"], ["x"]),
        (
            {"allOf": [listing("a"), listing("b")], "unevaluatedProperties": False},
            ["", "a", "ab"],
            ["x", "abx"],
        ),
        (
            {**listing("a"), "anyOf": [listing("b", required=True), listing("c", required=True)],
             "unevaluatedProperties": False},
            ["ab", "ac"],
            ["", "abx"],
        ),
        ({"allOf": [listing("a")], "unevaluatedProperties": NULL}, ["a", "ax"], []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("additional_properties", [False, True])
def test_unevaluated_properties_are_those_that_no_schema_lists(
    schema: dict[str, Any], valid: list[str], invalid: list[str], additional_properties: bool
) -> None:
    begin = COMPILER.compile(
        GrammarSpec("json_schema", json.dumps(schema), additional_properties=additional_properties)
    )
    assert [each for each in objects(*valid) if not accepts(begin, each)] == []
    assert [each for each in objects(*invalid) if accepts(begin, each)] == []
    validator = jsonschema.Draft202012Validator(schema)
    assert all(validator.is_valid(json.loads(each)) for each in objects(*valid))


@pytest.mark.parametrize(
    ("names", "valid", "invalid"),
    [
        (True, ["", "x"], []),
        ({}, ["", "x"], []),
        ({"type": "string"}, ["", "x"], []),
        ({"type": "string", "description": "a name"}, ["x"], []),
        (False, [""], ["x"]),
        ({"type": "integer"}, [""], ["x"]),
        ({"enum": ["a", "b"]}, ["", "a", "ab"], ["x", "ax"]),
        ({"type": "string", "enum": ["a", 1]}, ["", "a"], ["x"]),
        ({"const": "a"}, ["", "a"], ["x"]),
        ({"$ref": "#/$defs/names"}, ["", "a", "b"], ["x"]),
        ({"anyOf": [{"const": "a"}, {"$ref": "#/$defs/names"}]}, ["", "ab"], ["x"]),
        ({"pattern": "^[a-c]$"}, ["", "a", "c"], ["x"]),
        ({"minLength": 2, "maxLength": 3}, [""], ["x"]),
        ({"format": "uuid"}, [""], ["x"]),
    ],
)
def test_names_of_properties_are_enforced(names: Any, valid: list[str], invalid: list[str]) -> None:
    schema = {"type": "object", "propertyNames": names, "additionalProperties": NULL}
    schema["$defs"] = {"names": {"type": "string", "enum": ["a", "b"]}}
    begin = compile_json(json.dumps(schema))
    assert [each for each in objects(*valid) if not accepts(begin, each)] == []
    assert [each for each in objects(*invalid) if accepts(begin, each)] == []


def test_names_that_are_listed_hold_for_listed_properties_too_and_share_one_schema() -> None:
    inner = {"type": "object", "properties": {"q": NULL}, "required": ["q"]}
    schema = {
        "propertyNames": {"enum": ["a", "b", "c"]},
        "properties": {"a": NULL, "x": NULL},
        "additionalProperties": inner,
    }
    begin = compile_json(json.dumps({"type": "object", **schema}))
    assert accepts(begin, '{"a":null,"b":{"q":null},"c":{"q":null}}')
    assert not accepts(begin, '{"x":null}')
    assert not accepts(begin, '{"b":null}')


CAT = listing("a", required=True) | {"properties": {"kind": {"const": "cat"}, "a": NULL}, "required": ["kind"]}
DOG = {"type": "object", "properties": {"kind": {"enum": ["dog", "hound"]}, "b": NULL}, "required": ["kind"]}
PETS = {"$defs": {"Cat": CAT, "Dog": DOG, "Pet": {"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]}}}
TREE = {
    "$ref": "#/$defs/tree",
    "$defs": {
        "tree": {"oneOf": [{"$ref": "#/$defs/leaf"}, {"$ref": "#/$defs/pair"}]},
        "leaf": listing("a", required=True),
        "pair": {"type": "object", "properties": {"l": {"$ref": "#/$defs/tree"}, "r": NULL}, "required": ["l"]},
    },
}


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        ({"oneOf": [CAT, DOG]}, ['{"kind":"cat","a":null}', '{"kind":"hound"}'], ['{"kind":"cat","b":null}']),
        ({**PETS, "$ref": "#/$defs/Pet"}, ['{"kind":"cat"}', '{"kind":"dog","b":null}'], ['{"kind":"dog","a":null}']),
        ({**PETS, "oneOf": [{"$ref": "#/$defs/Pet"}, NULL]}, ['{"kind":"cat"}', "null"], ['"cat"']),
        ({**PETS, "type": "array", "items": {"$ref": "#/$defs/Pet"}}, ['[{"kind":"cat"},{"kind":"dog"}]'], ["[null]"]),
        (
            {**PETS, **listing("z"), "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]},
            ['{"z":null,"kind":"cat"}', '{"kind":"dog","b":null}'],
            ['{"z":null}', '{"kind":"dog","a":null}'],
        ),
        ({"oneOf": [{"const": 1, "title": "one"}, {"const": 2}]}, ["1", "2"], ["3"]),
        ({"oneOf": [{"type": "integer", "maximum": 3}, {"type": "integer", "minimum": 4}]}, ["3", "4"], ["4.5"]),
        ({"oneOf": [{"type": "string", "maxLength": 1}, {"type": "string", "minLength": 2}]}, ['"a"', '"ab"'], ["1"]),
        ({"oneOf": [{"type": ["integer", "null"]}, {"type": "string"}]}, ["null", '"a"'], ["1.5"]),
        (
            {
                "oneOf": [
                    {"prefixItems": [{"const": kind}], "type": "array", "minItems": 1, "items": NULL} for kind in "ab"
                ]
            },
            ['["a"]', '["b",null]'],
            ['["c"]'],
        ),
        # A property that one of them requires is not in answers that follow the other.
        ({"oneOf": [listing("a", required=True), listing("b", required=True)]}, objects("a", "b"), objects("", "ab")),
        (
            {**listing("a", "b"), "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
            objects("a", "b"),
            objects("", "ab"),
        ),
        (TREE, ['{"a":null}', '{"l":{"l":{"a":null},"r":null}}'], ['{"a":null,"l":{"a":null}}', "{}"]),
    ],
)
@pytest.mark.parametrize("additional_properties", [False, True])
def test_an_answer_fits_exactly_one_schema_of_a_oneof(
    schema: dict[str, Any], valid: list[str], invalid: list[str], additional_properties: bool
) -> None:
    validator = jsonschema.Draft202012Validator(schema)
    assert all(validator.is_valid(json.loads(each)) for each in valid)
    text = json.dumps(schema)
    if additional_properties and schema is TREE:
        return  # a schema that refers to itself cannot be changed where it does
    begin = COMPILER.compile(GrammarSpec("json_schema", text, additional_properties=additional_properties))
    assert [each for each in valid if not accepts(begin, each)] == []
    if not additional_properties:
        assert [each for each in invalid if accepts(begin, each)] == []
    rng = random.Random(5)
    for _ in range(10):
        answer = random_answer(begin.copy(), rng, 80)
        if answer is not None:
            validator.validate(json.loads(answer))


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "/oneOf"),
        ({"properties": {"p": {"oneOf": [listing("a"), listing("b")]}}}, "/properties/p/oneOf"),
        ({"oneOf": [listing("a", required=True), listing("a", "b", required=True)]}, "/oneOf"),
        ({"oneOf": [{"type": "string", "format": "ipv4"}, {"type": "string", "format": "ipv6"}]}, "/oneOf"),
        ({"oneOf": [{"const": 1}, {"enum": [1.0, 2]}]}, "/oneOf"),
        ({"oneOf": [{"type": "integer", "maximum": 10**300}, {"type": "number", "minimum": 2**53 - 1}]}, "/oneOf"),
    ],
)
def test_a_oneof_whose_schemas_overlap_is_refused_with_what_to_do(schema: dict[str, Any], place: str) -> None:
    with pytest.raises(
        GrammarError, match=f"at {place} is not supported: one value may match both its schemas 0 and 1; give"
    ):
        compile_json(json.dumps(schema))
