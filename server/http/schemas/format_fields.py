"""The fields that say what an answer must look like, under OpenAI's names and under vLLM's.

Knows what is well-formed; whether a grammar can be used is found out by compiling it.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from persimmon.model.grammar import GrammarSpec
from persimmon.server.http.schemas.constraint import Constraint
from persimmon.server.http.schemas.request_object import NAME_PATTERN, Refusal, Refused, RequestObject, invalid, missing


def schema_grammar(schema: Mapping[str, Any]) -> GrammarSpec:
    """The grammar of JSON that is valid under a JSON Schema."""
    return GrammarSpec("json_schema", json.dumps(schema, ensure_ascii=False, separators=(",", ":")))


class JsonSchemaFormat(RequestObject):
    """A JSON Schema, with a name that means nothing to the model."""

    name: str = Field(pattern=NAME_PATTERN)
    description: str | None = Field(None, description="For readers; the model does not see it.")
    definition: dict[str, Any] = Field(
        alias="schema", description="Complete answers match it, with properties in the schema's order."
    )
    strict: bool = Field(True, description="No effect: the schema is always enforced exactly.")


class ResponseFormat(RequestObject):
    """What an answer must look like, in OpenAI's words."""

    type: Literal["text", "json_object", "json_schema"] = Field(description='"text" is any text.')
    json_schema: JsonSchemaFormat | None = Field(
        None, description='Required with the type "json_schema", and only allowed with it.'
    )

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise missing("json_schema")
        if self.type != "json_schema" and self.json_schema is not None:
            raise invalid("json_schema", f"it is only allowed with the type 'json_schema', not with {self.type!r}")
        return self

    @property
    def constraint(self) -> Constraint | None:
        """What that is; None for any text."""
        if self.json_schema is not None:
            return Constraint("response_format.json_schema.schema", schema_grammar(self.json_schema.definition))
        return Constraint("response_format", GrammarSpec("json_object")) if self.type == "json_object" else None


def _schema(value: object) -> GrammarSpec:
    if isinstance(value, str):
        return GrammarSpec("json_schema", value)
    if isinstance(value, dict):
        return schema_grammar(value)
    raise ValueError("it must be a JSON Schema: an object, or a string that holds its JSON")


REFUSED_IN_STRUCTURED_OUTPUTS: Refused = {
    "disable_any_whitespace": Refusal("whitespace between JSON's tokens is fixed", (False,)),
    "structural_tag": Refusal("it is not implemented", instead="use tools, or grammar"),
    "whitespace_pattern": Refusal("whitespace between JSON's tokens is fixed"),
}


class StructuredOutputs(RequestObject):
    """What an answer must look like, in vLLM's words: exactly one of these."""

    refused = REFUSED_IN_STRUCTURED_OUTPUTS

    json_schema: Annotated[
        GrammarSpec | None,
        PlainValidator(_schema),
        WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}]}),
    ] = Field(None, alias="json", description="A JSON Schema, as in response_format, or a string that holds its JSON.")
    regex: str | None = Field(None, description="A regular expression that the whole answer matches.")
    choice: list[str] | None = Field(None, fail_fast=True, description="All possible answers.")
    grammar: str | None = Field(
        None, description="A context-free grammar, in EBNF (root ::= …) or in Lark's form (start: …)."
    )
    json_object: Literal[True] | None = Field(None, description="The answer is any JSON object.")
    disable_additional_properties: bool | None = Field(
        None,
        description="Whether objects may have only the properties that their JSON Schema lists, if the schema does "
        "not set additionalProperties. Default: true, unless the server is started with --additional-properties.",
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if len(self._grammars) != 1:
            given = " and ".join(self._grammars) or "none"
            raise ValueError(f"give exactly one of json, regex, choice, grammar and json_object, not {given}")
        return self

    @property
    def constraint(self) -> Constraint:
        """What that is."""
        [(name, grammar)] = self._grammars.items()
        closed = self.disable_additional_properties
        if closed is None:
            return Constraint(f"structured_outputs.{name}", grammar)
        grammar = replace(grammar, additional_properties=not closed)
        return Constraint(f"structured_outputs.{name}", grammar, says_additional_properties=True)

    @property
    def _grammars(self) -> dict[str, GrammarSpec]:
        grammars: dict[str, GrammarSpec] = {}
        if self.json_schema is not None:
            grammars["json"] = self.json_schema
        if self.regex is not None:
            grammars["regex"] = GrammarSpec("regex", self.regex)
        if self.choice is not None:
            grammars["choice"] = GrammarSpec("choice", json.dumps(self.choice, ensure_ascii=False))
        if self.grammar is not None:
            grammars["grammar"] = GrammarSpec("grammar", self.grammar)
        if self.json_object is not None:
            grammars["json_object"] = GrammarSpec("json_object")
        return grammars
