"""Schemas as the usual tools write them: each compiles, and what is answered under it is valid."""

import datetime
import enum
import json
import random
import uuid
from typing import Annotated, Any, Literal, Union

import jsonschema
import pydantic
import pytest
from pydantic import BaseModel, Field

from persimmon.model.grammar import GrammarSpec
from tests.model.grammar_walks import COMPILER, accepts, compile_json, random_answer


class Color(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(9, ge=0, le=9)


class Dog(BaseModel):
    kind: Literal["dog", "hound"] = "dog"
    color: Color | None = None


Pet = Annotated[Cat | Dog, Field(discriminator="kind")]


class Owner(BaseModel):
    """Somebody with animals."""

    name: str = Field(max_length=8, examples=["Ada"], title="Full name")
    pets: list[Pet] = Field(max_length=2)
    favourite: Pet | None = None
    by_color: dict[Color, Pet] = {}
    born: datetime.date
    seen: datetime.datetime | None = None
    id: uuid.UUID
    address: Annotated[str, Field(pattern="^[a-z]{1,5}$")] | Annotated[int, Field(gt=0, lt=2**63)]


class Expression(BaseModel):
    """A tree."""

    op: Literal["+", "-"]
    left: Union["Expression", Annotated[int, Field(ge=0, le=9)]]
    right: Union["Expression", Annotated[int, Field(ge=0, le=9)]]


class Odd(BaseModel):
    price: Annotated[float, Field(ge=0, le=100)]
    duration: datetime.timedelta
    at: datetime.time
    version4: pydantic.UUID4
    url: pydantic.AnyUrl | None
    address: pydantic.IPvAnyAddress | None
    pair: tuple[bool, Color]
    words: dict[str, bool] = Field(max_length=1)
    one: frozenset[bool] = Field(max_length=1)
    nothing: None
    small: int = Field(multiple_of=5, gt=-20, lt=20)


class Strict(BaseModel, extra="forbid"):
    value: Literal[1, "a", None, True]


class Loose(BaseModel, extra="allow"):
    value: bool


PYDANTIC: dict[str, type[BaseModel]] = {each.__name__: each for each in (Owner, Expression, Odd, Strict, Loose)}

STRING, BOOLEAN = {"type": "string", "maxLength": 5}, {"type": "boolean"}


def closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


ZOD: dict[str, Any] = {
    "record": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": BOOLEAN},
    "record of an enum": {
        "type": "object",
        "propertyNames": {"type": "string", "enum": ["a", "b"]},
        "additionalProperties": BOOLEAN,
        "required": ["a", "b"],
    },
    "partial record": {
        "type": "object",
        "propertyNames": {"type": "string", "enum": ["a", "b"]},
        "additionalProperties": BOOLEAN,
    },
    "record with a minimum": {
        "type": "object",
        "propertyNames": {"type": "string", "minLength": 1},
        "additionalProperties": {},
    },
    "discriminated union": {
        "oneOf": [
            closed(kind={"type": "string", "const": "cat"}, indoor=BOOLEAN),
            closed(kind={"type": "string", "const": "dog"}, trained=BOOLEAN),
        ]
    },
    "recursion": {
        "$ref": "#/$defs/Category",
        "$defs": {"Category": closed(name=STRING, sub={"type": "array", "items": {"$ref": "#/$defs/Category"}})},
    },
    "tuple": {
        "type": "array",
        "prefixItems": [BOOLEAN, {"type": "null"}],
        "items": False,
        "minItems": 2,
        "maxItems": 2,
    },
    "never": {"type": "object", "properties": {"a": {"not": {}}, "b": BOOLEAN}, "additionalProperties": False},
    "float64": {"type": "number", "minimum": -1.7976931348623157e308, "maximum": 1.7976931348623157e308},
    "float32": {"type": "number", "minimum": -3.4028234663852886e38, "maximum": 3.4028234663852886e38},
    "integer": {"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991},
    "loose object": {"type": "object", "properties": {"a": BOOLEAN}, "required": ["a"], "additionalProperties": {}},
    "includes": {
        "type": "string",
        "minLength": 2,
        "maxLength": 9,
        "format": "includes",
        "allOf": [{"pattern": "^ab.*"}],
    },
    "date": {
        "type": "string",
        "format": "date",
        "pattern": "^(?:(?:\\d\\d[2468][048]|\\d\\d[13579][26]|\\d\\d0[48]|[02468][048]00|[13579][26]00)-02-29|\\d{4}-"
        "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\\d|30)|(?:02)-(?:0[1-9]|1\\d|2[0-8]))"
        ")$",
    },
}

OTHERS: dict[str, Any] = {
    "OpenAI's guide: nullable and recursive": {
        "type": "object",
        "properties": {
            "label": {"type": ["string", "null"], "maxLength": 4},
            "children": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1},
        },
        "required": ["label", "children"],
        "additionalProperties": False,
    },
    "OpenAI's guide: anyOf of definitions": {
        "type": "object",
        "properties": {"item": {"anyOf": [{"$ref": "#/$defs/user"}, {"$ref": "#/$defs/address"}]}},
        "$defs": {"user": closed(name=STRING), "address": closed(number=STRING, street=STRING)},
        "required": ["item"],
        "additionalProperties": False,
        "strict": True,
    },
    "TypeBox: recursive by $id": {
        "$id": "T0",
        "type": "object",
        "required": ["nodes"],
        "properties": {"nodes": {"type": "array", "items": {"$ref": "T0"}, "maxItems": 2}},
    },
    "TypeBox: intersection": {
        "type": "object",
        "allOf": [
            {"type": "object", "required": ["a"], "properties": {"a": BOOLEAN}},
            {"type": "object", "required": ["b"], "properties": {"b": BOOLEAN}},
        ],
        "unevaluatedProperties": False,
    },
    "TypeBox: record": {"type": "object", "patternProperties": {"^(.*)$": BOOLEAN}},
    "NJsonSchema: inheritance and int64": {
        "definitions": {"Base": {"type": "object", "properties": {"Id": {"type": "integer", "format": "int64"}}}},
        "type": "object",
        "allOf": [{"$ref": "#/definitions/Base"}],
        "properties": {
            "Count": {"type": "integer", "format": "int32", "minimum": 1.0, "maximum": 2147483647.0},
            "Score": {"oneOf": [{"type": "null"}, {"type": "integer", "maximum": 9223372036854780000.0}]},
        },
        "required": ["Count"],
    },
    "OpenAPI 3.0: a discriminator with inheritance": {
        "components": {
            "schemas": {
                "Animal": {
                    "type": "object",
                    "required": ["type"],
                    "properties": {"type": {"type": "string", "maxLength": 3}},
                    "discriminator": {"propertyName": "type"},
                },
                "Cat": {
                    "allOf": [
                        {"$ref": "#/components/schemas/Animal"},
                        {"type": "object", "properties": {"type": {"enum": ["cat"]}, "lives": BOOLEAN}},
                    ]
                },
                "Dog": {
                    "allOf": [
                        {"$ref": "#/components/schemas/Animal"},
                        {"type": "object", "properties": {"type": {"enum": ["dog"]}, "barks": BOOLEAN}},
                    ]
                },
            }
        },
        "oneOf": [{"$ref": "#/components/schemas/Cat"}, {"$ref": "#/components/schemas/Dog"}],
    },
    "JSON Schema's own site: product": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.com/product.schema.json",
        "title": "Product",
        "type": "object",
        "properties": {
            "productId": {"description": "An identifier", "type": "integer", "minimum": 0, "maximum": 99},
            "price": {"type": "number", "exclusiveMinimum": 0, "maximum": 10},
            "tags": {"type": "array", "items": STRING, "minItems": 1, "maxItems": 1, "uniqueItems": True},
            "dimensions": closed(length={"type": "number", "minimum": 0, "maximum": 9}),
        },
        "required": ["productId", "price"],
        "dependentRequired": {},
    },
    "a choice of keys": {
        "type": "object",
        "properties": {"email": {"type": "string", "format": "email"}, "phone": {"type": "string", "maxLength": 5}},
        "oneOf": [{"required": ["email"]}, {"required": ["phone"]}],
    },
    "labelled values": {
        "oneOf": [{"const": 1, "title": "low"}, {"const": 2, "title": "high", "description": "or more"}]
    },
    "an array that contains anything": {"type": "array", "items": BOOLEAN, "contains": {}, "maxItems": 2},
    "bounds of draft 4": {
        "type": "integer",
        "minimum": 0,
        "exclusiveMinimum": True,
        "maximum": 9,
        "exclusiveMaximum": False,
    },
    "unsigned 64-bit integers": {"type": "integer", "minimum": 0, "maximum": 2**64 - 1},
}

SCHEMAS = {
    **{f"pydantic: {name}": each.model_json_schema() for name, each in PYDANTIC.items()},
    **{f"zod: {name}": schema for name, schema in ZOD.items()},
    **OTHERS,
}


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("additional_properties", [False, True])
def test_schemas_of_the_usual_tools_are_followed(name: str, additional_properties: bool) -> None:
    schema = SCHEMAS[name]
    if schema.get("minimum") is not None and isinstance(schema.get("exclusiveMinimum"), bool):
        validator: Any = jsonschema.Draft4Validator(schema)
    else:
        validator = jsonschema.Draft202012Validator(
            schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
    begin = COMPILER.compile(
        GrammarSpec("json_schema", json.dumps(schema), additional_properties=additional_properties)
    )
    rng = random.Random(2)
    ended = 0
    for _ in range(12):
        answer = random_answer(begin.copy(), rng, 300)
        if answer is not None:
            ended += 1
            validator.validate(json.loads(answer))
    assert ended or additional_properties


@pytest.mark.parametrize("name", PYDANTIC)
def test_answers_under_pydantics_schemas_become_its_models(name: str) -> None:
    begin = compile_json(json.dumps(PYDANTIC[name].model_json_schema()))
    rng = random.Random(3)
    for _ in range(12):
        answer = random_answer(begin.copy(), rng, 300)
        if answer is not None:
            PYDANTIC[name].model_validate_json(answer)


def test_descriptions_do_not_count_towards_the_size_of_a_schema() -> None:
    texts = {"description": "long " * 30_000, "default": ["x" * 50_000], "$comment": "c" * 50_000}
    unused = {"$defs": {"unused": {"enum": ["y" * 90_000]}}}
    schema = {"type": "object", "properties": {"a": {**BOOLEAN, **texts}}, **texts, **unused}
    assert accepts(compile_json(json.dumps(schema)), '{"a":true}')
