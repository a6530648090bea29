"""Schemas, expressions and grammars at this server's limits, and what is none of them.  Only data, as limits.py."""

from typing import Any

from persimmon.model.grammar.compiler import MAX_CHOICES as MAX_LISTED_CHOICES
from persimmon.model.grammar.compiler import MAX_REGEX_BYTES, MAX_SCHEMA_TEXT_BYTES
from persimmon.model.grammar.context_free import MAX_BYTES as MAX_GRAMMAR_BYTES
from persimmon.model.grammar.context_free import MAX_RULES
from persimmon.model.grammar.json_text import MAX_DEPTH
from persimmon.model.grammar.schema_reader import MAX_DIVISOR, MAX_PATTERN_BYTES, MAX_PROPERTIES
from tests.end_to_end.limit_case import CHAT, COMPLETIONS, HALF_PAIR, NOT_JSON, Case, refused, request, served


def _schema(name: str, schema: object, says: str = "") -> Case:
    """A chat whose answer must be valid under a schema; served where nothing is said."""
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return request(f"schema: {name}", CHAT, 400 if says else 200, says, {"response_format": form})


def _form(name: str, says: str = "", /, **constraint: object) -> Case:
    """A completion whose answer must have a form; served where nothing is said."""
    return request(name, COMPLETIONS, 400 if says else 200, says, {"structured_outputs": constraint})


def _levels(depth: int) -> dict[str, Any]:
    """A schema of objects within objects."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def _properties(size: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{number}": {"type": "null"} for number in range(size)}}


def _rules(size: int) -> str:
    chain = [f'r{number}: "a" r{number + 1}' for number in range(1, size - 1)]
    return "\n".join(["start: r1", *chain, f'r{size - 1}: "b"'])


_CHOICES = [f"c{number}" for number in range(MAX_LISTED_CHOICES + 1)]
_PATTERN = "a" * MAX_PATTERN_BYTES

GRAMMARS = [
    _form("the longest regex", regex="a" * MAX_REGEX_BYTES),
    _form("a regex one byte too long", str(MAX_REGEX_BYTES), regex="a" * (MAX_REGEX_BYTES + 1)),
    _form("as many choices as are read", choice=_CHOICES[1:]),
    _form("one choice too many", f"{MAX_LISTED_CHOICES}", choice=_CHOICES),
    _form("as many rules as are read", grammar=_rules(MAX_RULES)),
    _form("one rule too many", str(MAX_RULES), grammar=_rules(MAX_RULES + 1)),
    _form("a grammar that is too long", str(MAX_GRAMMAR_BYTES), grammar='root ::= "a"' + " " * MAX_GRAMMAR_BYTES),
    _schema("as many properties as are read", _properties(MAX_PROPERTIES)),
    _schema("one property too many", _properties(MAX_PROPERTIES + 1), f"{MAX_PROPERTIES}"),
    _schema("as many levels as are read", _levels(MAX_DEPTH - 1)),
    _schema("one level too many", _levels(MAX_DEPTH), str(MAX_DEPTH)),
    _schema("the longest pattern", {"type": "string", "pattern": _PATTERN}),
    _schema(
        "a pattern one byte too long",
        {"type": "string", "pattern": _PATTERN + "a"},
        f"{MAX_PATTERN_BYTES}",
    ),
    _schema("the largest divisor", {"type": "integer", "multipleOf": MAX_DIVISOR}),
    _schema("a larger divisor", {"type": "integer", "multipleOf": MAX_DIVISOR + 1}, str(MAX_DIVISOR)),
    _schema("a description of nearly 1 MB", {"description": "a" * (MAX_SCHEMA_TEXT_BYTES - 100)}),
    _schema("a longer text than is read", {"description": "a" * MAX_SCHEMA_TEXT_BYTES}, str(MAX_SCHEMA_TEXT_BYTES)),
    _schema("not an object", "object", "response_format"),
    _schema("an unknown type", {"type": "other"}, "response_format"),
    _schema("a property that is not a schema", {"type": "object", "properties": {"a": 5}}, "response_format"),
    _schema("a reference to nothing", {"$ref": "#/$defs/missing"}, "response_format"),
    _schema("a reference out of the schema", {"$ref": "http://127.0.0.1:9/schema.json"}, "response_format"),
    _schema("a reference to itself", {"$ref": "#"}, "response_format"),
    _schema("no value that fits", {"type": "integer", "minimum": 5, "maximum": 1}, "response_format"),
    _schema("an empty enum", {"enum": []}, "response_format"),
    _schema("an infinite bound", {"type": "number", "maximum": float("inf")}, "response_format"),
    _schema("half a pattern", {"type": "string", "pattern": "("}, "response_format"),
    _schema("half a surrogate pair", {"type": "string", "pattern": HALF_PAIR}, NOT_JSON),
    refused("response_format: another type", "response_format.type", CHAT, response_format={"type": "other"}),
    refused("response_format: no schema", "json_schema", CHAT, response_format={"type": "json_schema"}),
    _form("an empty regex", "is empty", regex=""),
    _form("half a regex", "structured_outputs.regex", regex="("),
    _form("half an escape", "middle of an escape", regex="a\\"),
    _form("a regex that refers back", "structured_outputs.regex", regex="(a)\\1"),
    _form("no choices", "one or more", choice=[]),
    _form("an empty choice", "one or more", choice=[""]),
    _form("a choice that is null", "choice", choice=[None]),
    _form("an empty grammar", "structured_outputs.grammar", grammar=""),
    _form("a grammar without a rule that it names", "structured_outputs.grammar", grammar="root ::= missing"),
    _form("a grammar without an end", "structured_outputs.grammar", grammar="root ::= root"),
    _form("half a schema", "structured_outputs.json", json="{"),
    _form("no form", "exactly one"),
    _form("two forms", "exactly one", regex="a", choice=["a"]),
    served(
        "a form, biases and stop tokens", structured_outputs={"regex": "a+"}, logit_bias={"5": 100}, stop_token_ids=[5]
    ),
    served("a form that ends before min_tokens", structured_outputs={"choice": ["a"]}, min_tokens=2),
    served("a stream of 16 forms", structured_outputs={"json": {}}, stream=True, n=16),
]
