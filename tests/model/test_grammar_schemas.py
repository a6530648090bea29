import json
import random
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persimmon.model.grammar import GrammarError, GrammarSpec
from persimmon.model.grammar.json_schema import read_schema
from persimmon.model.grammar.schema_reader import UNSUPPORTED
from tests.model.grammar_walks import COMPILER, accepts, compile_json, random_answer

TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"value": {"type": "boolean"}, "next": {"$ref": "#/$defs/node"}},
            "required": ["value"],
            "additionalProperties": False,
        }
    }
}


def compiled(schema: Any) -> Any:
    return compile_json(json.dumps(schema))


def refusal(schema: Any) -> str:
    with pytest.raises(GrammarError) as caught:
        compiled(schema)
    message = str(caught.value)
    assert message.startswith("the JSON schema")
    assert "\n" not in message
    assert len(message) < 500
    return message


# Schemas whose values are soon at an end, so that a random walk gets there.
SCALARS = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-99, 99),
        st.integers(0, 500),
    ),
    st.builds(lambda low: {"type": "number", "minimum": low, "exclusiveMaximum": low + 2}, st.integers(-9, 9)),
    st.builds(
        lambda factor: {"type": "integer", "multipleOf": factor, "minimum": 0, "maximum": 999}, st.integers(1, 60)
    ),
    st.builds(
        lambda low, size: {"type": "string", "minLength": low, "maxLength": low + size},
        st.integers(0, 3),
        st.integers(0, 4),
    ),
    st.sampled_from(["^[a-z]{1,3}$", "\\d\\d", "^(x|yz)?$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern, "maxLength": 9}
    ),
    st.sampled_from(["date", "time", "date-time", "uuid", "ipv4", "ipv6", "duration", "json-pointer"]).map(
        lambda name: {"type": "string", "format": name}
    ),
    st.sampled_from(
        [
            {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
            {"type": "integer", "format": "uint8"},
            {"type": "integer", "exclusiveMinimum": 2**53 + 1, "maximum": 2**53 + 9},
            {"type": "number", "minimum": -1.5, "maximum": 1.7e308},
            {"type": "number", "exclusiveMinimum": 1e-300, "maximum": 1},
        ]
    ),
    st.lists(
        st.sampled_from([None, True, 0, -1, 2.5, "", "é", 'a"b\\', [1, "x"], {"k": []}]), min_size=1, max_size=3
    ).map(lambda values: {"enum": values}),
    st.sampled_from([{"const": "fixed"}, {"const": {"a": [1, 2]}}, {"type": ["null", "boolean"]}]),
    st.just({"$ref": "#/$defs/node"}),
)
NAMES = st.sampled_from(["a", "b", "name", "é", 'q"', "x y", "node"])


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.builds(
            lambda items, low, size: {"type": "array", "items": items, "minItems": low, "maxItems": low + size},
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        st.builds(
            lambda first, second: {"type": "array", "prefixItems": [first, second], "items": False}, inner, inner
        ),
        st.dictionaries(NAMES, inner, max_size=4).flatmap(
            lambda properties: (
                st.lists(st.sampled_from(sorted(properties)), unique=True).map(
                    lambda required: {
                        "type": "object",
                        "properties": properties,
                        "required": required,
                        "additionalProperties": False,
                    }
                )
                if properties
                else st.just({"type": "object", "additionalProperties": False})
            )
        ),
        st.builds(lambda values: {"type": "object", "additionalProperties": values, "maxProperties": 2}, inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"oneOf": options}),
        st.builds(
            lambda names, values, more: {
                "type": "object",
                "propertyNames": names,
                "additionalProperties": values,
                **more,
            },
            st.sampled_from(
                [True, {"type": "string"}, {"enum": ["a", "b"]}, {"pattern": "^[xy]{1,2}$"}, {"maxLength": 1}]
            ),
            inner,
            st.sampled_from([{}, {"required": ["a"]}, {"maxProperties": 1}, {"unevaluatedProperties": False}]),
        ),
        st.builds(
            lambda first, rest, options, more: {
                "type": "object",
                "properties": first,
                "allOf": [{"properties": rest}],
                "anyOf": options,
                **more,
            },
            st.dictionaries(NAMES, inner, max_size=2),
            st.dictionaries(NAMES, inner, max_size=2),
            st.lists(
                st.dictionaries(NAMES, inner, max_size=2).map(lambda own: {"properties": own}), min_size=1, max_size=2
            ),
            st.sampled_from([{}, {"unevaluatedProperties": False}, {"required": ["a"]}]),
        ),
        st.builds(
            lambda tags, values: {
                "oneOf": [
                    {"type": "object", "properties": {"kind": {"const": tag}, "v": value}, "required": ["kind"]}
                    for tag, value in zip(tags, values, strict=False)
                ]
            },
            st.permutations(["x", "y", 1, None]),
            st.lists(inner, min_size=1, max_size=3),
        ),
        st.builds(
            lambda items, more: {"type": "array", "items": items, "maxItems": 1, **more},
            inner,
            st.sampled_from([{"uniqueItems": True}, {"contains": {}}, {"minContains": 2}, {"unevaluatedItems": False}]),
        ),
        st.builds(
            lambda left, right: {"allOf": [{"anyOf": [left, {"type": "null"}]}, {"anyOf": [right, {"type": "null"}]}]},
            inner,
            inner,
        ),
    )


SCHEMAS = st.recursive(SCALARS, containers, max_leaves=6)


@given(schema=SCHEMAS, seed=st.integers(0, 2**32), additional_properties=st.booleans())
@settings(deadline=None, max_examples=300)
def test_every_answer_that_ends_is_valid(schema: dict[str, Any], seed: int, additional_properties: bool) -> None:
    schema = {**TREE, **schema}
    try:
        matcher = COMPILER.compile(
            GrammarSpec("json_schema", json.dumps(schema), additional_properties=additional_properties)
        )
    except GrammarError:
        return  # what allOf leaves may be nothing, and schemas of oneOf may overlap
    answer = random_answer(matcher, random.Random(seed))
    if answer is not None:
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(answer))


@given(schema=SCHEMAS)
@settings(deadline=None, max_examples=100)
def test_schemas_without_conjunctions_compile(schema: dict[str, Any]) -> None:
    text = json.dumps(schema)
    # Schemas of oneOf may overlap, and a required property may have no value.
    if not any(f'"{keyword}"' in text for keyword in ("allOf", "oneOf", "propertyNames")):
        compiled({**TREE, **schema})


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        (True, ["1", "[{}]"], ["nul"]),
        ({"type": "string", "pattern": "b"}, ['"abc"'], ['"a"']),
        ({"type": "string", "pattern": "^a|c$"}, ['"ab"', '"bc"'], ['"bb"']),
        ({"type": "string", "minLength": 2, "maxLength": 2}, ['"é😀"', '"\\n\\""'], ['"a"', '"abc"']),
        ({"type": "number", "multipleOf": 0.25}, ["0.50", "-3", "7.75"], ["0.30"]),
        ({"type": "integer", "exclusiveMinimum": -3, "maximum": 12}, ["-2", "12"], ["-3", "13", "1.5"]),
        ({"type": "number", "minimum": 1, "exclusiveMinimum": True}, ["1.01"], ["1", "0.9"]),
        (
            {"items": [{"type": "null"}], "type": "array", "additionalItems": False},
            ["[]", "[null]"],
            ["[1]", "[null,1]"],
        ),
        (
            {"type": "object", "patternProperties": {"^x": {"type": "null"}}, "additionalProperties": False},
            ['{"xy":null}'],
            ['{"a":null}', '{"x":1}'],
        ),
        (
            {"type": "object", "additionalProperties": {"type": "null"}, "maxProperties": 1},
            ["{}", '{"a":null}'],
            ['{"a":null,"b":null}'],
        ),
        (
            {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["b"], "additionalProperties": False},
            ['{"b":1}', '{"a":1, "b":2}'],
            ["{}", '{"a":1}', '{"b":1,"a":2}'],
        ),
        ({"oneOf": [{"type": "null"}, {"type": "string"}]}, ["null", '"a"'], ["1"]),
        (
            {
                "allOf": [
                    {"properties": {"a": {"minimum": 3}}},
                    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
                ]
            },
            ['{"a":3}'],
            ['{"a":2}', "{}"],
        ),
        ({"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": {"const": 1}}}, ["1"], ["2"]),
        (
            {"$ref": "#/components/schemas/0", "components": {"schemas": [{"type": "null"}]}, "nullable": False},
            ["null"],
            ["1"],
        ),
        ({"anyOf": [{"type": "array", "items": {"$ref": "#"}}, {"type": "null"}]}, ["null", "[[null],[]]"], ["[1]"]),
        (
            {
                "$id": "https://example.com/a",
                "title": "A",
                "deprecated": True,
                "default": 1,
                "format": "int32",
                "type": "integer",
            },
            ["1"],
            ["1.5"],
        ),
        ({"type": "string", "format": "binary", "contentEncoding": "base64"}, ['"!"'], ["1"]),
        ({"const": "\n\t"}, ['"\\n\\t"'], ['"\\u000a\\t"']),
        ({"const": None}, ["null"], ["1", "{}"]),
        ({"const": None, "enum": [None, 1]}, ["null"], ["1", "{}"]),
        ({"const": False}, ["false"], ["null", "0"]),
        ({"type": "array", "uniqueItems": False, "maxItems": 1.0}, ["[1]"], ["[1,1]"]),
    ],
)
def test_keywords_mean_what_json_schema_says(schema: Any, valid: list[str], invalid: list[str]) -> None:
    matcher = compiled(schema)
    assert [text for text in valid if not accepts(matcher, text)] == []
    assert [text for text in invalid if accepts(matcher, text)] == []


UNENFORCED: dict[str, Any] = {
    "not": {"not": {"type": "null"}},
    "if": {"if": {"minimum": 1}, "then": {"maximum": 2}},
    "dependencies": {"dependencies": {"b": ["c"]}},
    "dependentRequired": {"dependentRequired": {"b": ["c"]}},
    "dependentSchemas": {"dependentSchemas": {"b": {"required": ["c"]}}},
    "uniqueItems": {"uniqueItems": True, "maxItems": 2},
    "contains": {"contains": {"type": "null"}},
    "propertyNames": {"propertyNames": {"pattern": "^b"}, "properties": {"c": {}}},
    "unevaluatedItems": {"allOf": [{"prefixItems": [{}]}], "unevaluatedItems": False},
    "$dynamicRef": {"$dynamicRef": "#a"},
    "$recursiveRef": {"$recursiveRef": "#"},
}


@pytest.mark.parametrize("keyword", UNENFORCED)
def test_keywords_that_cannot_be_enforced_are_refused_by_name_with_what_to_do(keyword: str) -> None:
    message = f"at /properties/a/{keyword} is not supported; {UNSUPPORTED[keyword]}"
    assert message in refusal({"properties": {"a": UNENFORCED[keyword]}})


def test_names_of_properties_are_not_taken_for_keywords() -> None:
    schema = {"type": "object", "properties": {"not": {"type": "null"}, "$id": {"const": 1}, "$ref": {"type": "null"}}}
    assert accepts(compiled(schema), '{"not":null,"$id":1,"$ref":null}')


def test_a_name_cannot_be_written_in_another_way_to_escape_its_schema() -> None:
    matcher = compiled(
        {"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "integer"}}
    )
    assert accepts(matcher, '{"a":null,"b":1}')
    assert not accepts(matcher, '{"a":null,"\\u0061":1}')
    assert not accepts(matcher, '{"b":1,"a":1}')


def test_a_clients_options_for_the_engine_are_not_passed_on() -> None:
    schema = {"type": "array", "x-guidance": {"whitespace_flexible": True, "lenient": True}}
    assert not accepts(compiled(schema), "[1,  2]")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ('{"minimum": NaN}', "NaN is not a number"),
        ('{"minimum": 1e999}', "not valid JSON"),
        ('{"const": "\\ud800"}', "lone surrogate"),
        ("[]", "is an array; expected an object"),
        ('"object"', "is a string; expected an object"),
    ],
)
def test_a_text_that_is_no_schema_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(GrammarError, match=complaint):
        compile_json(text)


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        (False, "no value matches it"),
        ({"type": "strin"}, 'at /type is "strin"; expected one or several of'),
        ({"type": []}, "at /type is []"),
        ({"type": ["null", "null"]}, "at /type is"),
        ({"type": "object", "properties": []}, "at /properties is an array; expected an object"),
        ({"properties": {"a": 1}}, "at /properties/a is a number; expected a schema"),
        ({"required": "a"}, "at /required is"),
        ({"required": [1]}, "at /required is"),
        ({"enum": "a"}, "at /enum is a string"),
        ({"anyOf": {}}, "at /anyOf is an object"),
        ({"minLength": -1}, "at /minLength is -1"),
        ({"maxItems": 10**12}, "at /maxItems is 1000000000000"),
        ({"minimum": "1"}, 'at /minimum has "1"'),
        ({"type": "number", "minimum": 10**20}, "at /minimum allows only numbers beyond"),
        ({"type": "integer", "exclusiveMaximum": -(2**63)}, "at /exclusiveMaximum allows only numbers beyond"),
        ({"const": 2**53 + 1}, "at /const has 9007199254740993"),
        ({"enum": ["\x01"]}, "at /enum contains the control character U+0001"),
        ({"multipleOf": 0}, "at /multipleOf is 0"),
        ({"multipleOf": 1009}, "at /multipleOf is 1009"),
        ({"pattern": "("}, "unclosed group"),
        ({"pattern": "(?!a)"}, "look-around"),
        ({"pattern": 1}, "at /pattern is a number"),
        ({"pattern": "a" * 1025}, "at /pattern is too long"),
        ({"type": "string", "format": "regex"}, "at /format is 'regex'; expected one of"),
        ({"$ref": "https://example.com/schema"}, "references within the schema"),
        ({"$ref": "#name"}, 'refers to "#name", which is not in it'),
        ({"$ref": "#/$defs/a"}, 'refers to "#/$defs/a", which is not in it'),
        ({"$ref": 1}, "at /$ref is 1"),
        ({"$ref": "#"}, "no text matches it"),
        ({"allOf": [{"$ref": "#"}, {"type": "object"}]}, "refers to itself"),
        ({"type": "object", "minProperties": 2}, "at /minProperties can be at most 1 here"),
        (
            {"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 1, "additionalProperties": {}},
            "minProperties and maxProperties are",
        ),
        (
            {"oneOf": [{"type": "string"}, {"maxLength": 3}]},
            "at /oneOf is not supported: one value may match both its schemas 0",
        ),
        (
            {"type": "string", "pattern": "^a", "minLength": 2, "maxLength": 1},
            "no value matches it: minLength (2) is greater",
        ),
        ({"allOf": [{"pattern": "^a$"}, {"pattern": "^b$"}], "type": "string"}, "no string matches it"),
        ({"allOf": [{"type": "integer", "multipleOf": 2}, {"multipleOf": 3}]}, "two values of multipleOf"),
        ({"patternProperties": {"^a": {}, "b$": {}}}, "not disjoint"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_with_the_place_and_the_reason(schema: Any, complaint: str) -> None:
    assert complaint in refusal(schema)


def test_what_constrains_nothing_is_left_out_and_references_are_renumbered() -> None:
    schema = {
        "title": "T",
        "$defs": {"long name": {"type": "null", "description": "nothing"}, "unused": {"type": "wrong"}},
        "properties": {"a": {"$ref": "#/$defs/long name"}, "b": {"$ref": "#"}},
        "x-more": {},
    }
    assert read_schema(json.dumps(schema)) == {
        "properties": {"a": {"$ref": "#/$defs/0"}, "b": {"$ref": "#"}},
        "$defs": {"0": {"type": "null"}},
        "additionalProperties": False,
    }


def test_literals_are_left_as_they_are() -> None:
    literal = {"$ref": 1, "title": {"x-a": None}, "enum": [{"not": 1}]}
    assert read_schema(json.dumps({"const": literal})) == {"const": literal}


def test_pydantics_schemas_compile() -> None:
    from enum import Enum
    from uuid import UUID

    from pydantic import BaseModel, Field

    class Color(Enum):
        RED = "red"
        BLUE = "blue"

    class Part(BaseModel):
        id: UUID
        colors: list[Color] = []
        price: float = Field(ge=0, description="in euros")

    class Order(BaseModel):
        """An order."""

        name: str = Field(min_length=1, max_length=20)
        main: Part
        parts: dict[str, Part] = {}
        note: str | None = None
        pair: tuple[int, str]

    order = Order(
        name="x", main=Part(id=UUID(int=7), colors=[Color.RED], price=2.5), parts={}, note=None, pair=(1, "a")
    )
    assert accepts(compiled(Order.model_json_schema()), order.model_dump_json())
