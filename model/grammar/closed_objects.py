"""Objects that list their properties get no others, unless the schema opens them; also unevaluatedProperties.

Pydantic and most people write no `additionalProperties`.  JSON Schema then allows any property, and a model that may
write any keeps adding them; xgrammar, vLLM's engine, closes such objects too.  All schemas that apply to one value are
closed together, as `unevaluatedProperties: false` would: those of allOf, $ref, and one of anyOf.

Takes schemas as `one_of` leaves them, and gives formats the expressions that the engine enforces.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from persimmon.model.grammar.formats import FORMATS
from persimmon.model.grammar.schema_size import MAX_LEVELS
from persimmon.model.grammar_spec import GrammarError

Schema = dict[str, Any] | bool

MAX_COPIED = 40_000
"""Properties of definitions that are written again because what stands next to a reference changes what it closes."""


@dataclass(frozen=True)
class _Names:
    """What schemas that apply to one value say of its properties.

    Attributes:
        names, patterns: those that are listed.
        lists: whether any of the schemas lists properties.
        settled: whether one of them says what all others may be, or lists all values.
    """

    names: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    lists: bool = False
    settled: bool = False

    def __or__(self, other: "_Names") -> "_Names":
        return _Names(
            names=tuple(dict.fromkeys(self.names + other.names)),
            patterns=tuple(dict.fromkeys(self.patterns + other.patterns)),
            lists=self.lists or other.lists,
            settled=self.settled or other.settled,
        )


@dataclass(frozen=True)
class _Closing:
    """What a schema has to be closed with.

    Attributes:
        around: what the other schemas that apply to the same value say.
        rest: the schema of properties that none of them lists.
    """

    around: _Names = _Names()
    rest: Schema = False

    def within(self, names: _Names) -> "_Closing":
        """The same for one of several schemas, with what the others say."""
        return _Closing(self.around | names, self.rest)


_CLOSED = _Closing()


def close_objects(root: Mapping[str, Any], additional_properties: bool) -> dict[str, Any]:
    """The same schema in the engine's keywords, with its objects closed.

    Args:
        root: the schema, its definitions under $defs.
        additional_properties: whether objects stay open where the schema does not say.

    Raises:
        GrammarError: it would grow too large.
    """
    return _Closer(root, None if additional_properties else _CLOSED).close()


class _Closer:
    """Rewrites one document.

    A definition may be needed twice: closed, and bare where other schemas apply to the same value, which is then closed
    as a whole.

    Args:
        root: the document.
        usual: what schemas without a combined one are closed with; None leaves them open.
    """

    def __init__(self, root: Mapping[str, Any], usual: _Closing | None) -> None:
        self._root = {key: value for key, value in root.items() if key != "$defs"}
        self._definitions: Mapping[str, Any] = root.get("$defs", {})
        self._usual = usual
        self._variants: dict[tuple[str, bool], str] = {}
        self._known: dict[str, _Names] = {}
        self._copied = 0

    def close(self) -> dict[str, Any]:
        """The whole document."""
        root = self._rewritten(self._root, self._usual)
        definitions: dict[str, Schema] = {}
        while len(definitions) < len(self._variants):
            (reference, bare), name = list(self._variants.items())[len(definitions)]
            definitions[name] = self._rewritten(self._target(reference), None if bare else self._usual)
        whole: dict[str, Any] = root if isinstance(root, dict) else {"allOf": [root]}
        return {**whole, "$defs": definitions} if definitions else whole

    def _rewritten(self, schema: Any, closing: _Closing | None) -> Schema:
        """A schema in the engine's keywords; None closes nothing."""
        if not isinstance(schema, dict):
            return bool(schema)
        if "unevaluatedProperties" in schema:
            rest = self._alone(schema["unevaluatedProperties"])
            own = {key: value for key, value in schema.items() if key != "unevaluatedProperties"}
            return self._rewritten(own, None if rest is True else _Closing(_Names(lists=True), rest))
        if closing is None:
            return self._parts(schema, {})
        if len(schema) == 1 and len(schema.get("allOf", ())) == 1:
            return self._rewritten(schema["allOf"][0], closing)
        if schema.keys() == {"$ref"} and closing == self._usual:
            return {"$ref": self._reference(schema["$ref"], bare=False)}
        return self._closed(schema, closing)

    def _alone(self, schema: Any) -> Schema:
        """A schema of a value that no other schema applies to."""
        return self._rewritten(schema, self._usual)

    def _closed(self, schema: dict[str, Any], closing: _Closing) -> Schema:
        alternatives, others = _split(schema)
        around = closing.around | self._said(others)
        if not alternatives or around.settled:
            return self._limited(schema, closing.around | self._said(schema), closing.rest)
        replaced: dict[int, Schema] = {}
        for part in alternatives:
            names = around
            if "anyOf" not in schema:
                for other in alternatives:
                    names |= self._said(other) if other is not part else _Names()
            replaced[id(part)] = self._rewritten(part, _Closing(names, closing.rest))
        return self._parts(schema, replaced)

    def _limited(self, schema: dict[str, Any], names: _Names, rest: Schema) -> Schema:
        """A schema of which `rest` holds for all properties but those of some names."""
        if names.settled or not names.lists or "object" not in schema.get("type", "object"):
            return self._parts(schema, {})
        schema = self._without_reference(schema)
        bare = self._parts(schema, {})
        if schema.keys() & {"$ref", "allOf", "anyOf"}:
            return {"allOf": [bare, _with_names({}, names, rest)]}
        self._copied += len(names.names)
        if self._copied > MAX_COPIED:
            raise GrammarError("the JSON schema is too large after the objects in its alternatives are expanded")
        return _with_names(bare, names, rest)

    def _without_reference(self, schema: dict[str, Any]) -> dict[str, Any]:
        """What a schema refers to, where that is all it does and nothing else applies to the same value."""
        for _ in range(MAX_LEVELS):
            if schema.keys() != {"$ref"}:
                break
            target = self._target(schema["$ref"])
            if not isinstance(target, dict) or target.keys() & {"unevaluatedProperties", "allOf", "anyOf"}:
                break
            schema = target
        return schema

    def _parts(self, schema: dict[str, Any], replaced: Mapping[int, Schema]) -> dict[str, Any]:
        """A schema whose own keywords close nothing; of the schemas in it, some are replaced."""

        def in_place(part: Any) -> Schema:
            return replaced[id(part)] if id(part) in replaced else self._rewritten(part, None)

        parts: dict[str, Any] = {}
        for key, value in schema.items():
            match key:
                case "$ref":
                    parts[key] = self._reference(value, bare=True)
                case "allOf" | "anyOf":
                    parts[key] = [in_place(part) for part in value]
                case "properties" | "patternProperties":
                    parts[key] = {name: self._alone(part) for name, part in value.items()}
                case "prefixItems":
                    parts[key] = [self._alone(part) for part in value]
                case "items" if isinstance(value, list):
                    parts[key] = [self._alone(part) for part in value]
                case "items" | "additionalItems" | "additionalProperties":
                    parts[key] = self._alone(value)
                case "format" if "pattern" not in schema:
                    parts["pattern"] = FORMATS[value]
                case _:
                    parts[key] = value
        if "format" in parts:
            pattern = {"pattern": FORMATS[parts.pop("format")]}
            parts["allOf"] = [*parts.get("allOf", ()), pattern]
        return parts

    def _target(self, reference: str) -> Any:
        return self._root if reference == "#" else self._definitions[reference.rpartition("/")[2]]

    def _reference(self, reference: str, bare: bool) -> str:
        """A reference to one of a definition's variants."""
        bare = bare and self._usual is not None and self._said_by(reference).lists
        if reference == "#" and not bare:
            return reference
        return f"#/$defs/{self._variants.setdefault((reference, bare), str(len(self._variants)))}"

    def _said(self, schema: Any) -> _Names:
        """What a schema, and those that apply to the same value because of it, say of properties."""
        if not isinstance(schema, dict):
            return _Names()
        said = _Names(
            names=(*schema.get("properties", ()), *schema.get("required", ())),
            patterns=tuple(schema.get("patternProperties", ())),
            lists="properties" in schema or "patternProperties" in schema,
            settled=any(key in schema for key in ("additionalProperties", "unevaluatedProperties", "const", "enum")),
        )
        if "$ref" in schema:
            said |= self._said_by(schema["$ref"])
        for part in (*schema.get("allOf", ()), *schema.get("anyOf", ())):
            said |= self._said(part)
        return said

    def _said_by(self, reference: str) -> _Names:
        if reference not in self._known:
            self._known[reference] = _Names()  # of what refers to itself
            self._known[reference] = self._said(self._target(reference))
        return self._known[reference]


def _split(schema: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The parts of a schema with alternatives that list properties of their own, and the schema without them."""
    if "anyOf" in schema:
        return schema["anyOf"], {key: value for key, value in schema.items() if key != "anyOf"}
    parts = schema.get("allOf", ())
    alternatives = [part for part in parts if isinstance(part, dict) and "anyOf" in part]
    return alternatives, {**schema, "allOf": [part for part in parts if part not in alternatives]}


def _with_names(schema: dict[str, Any], names: _Names, rest: Schema) -> dict[str, Any]:
    """A schema of whose properties `rest` holds for all but some."""
    closed = dict(schema)
    for key, listed in (("properties", names.names), ("patternProperties", names.patterns)):
        own = schema.get(key, {})
        if listed:
            closed[key] = own | {name: True for name in listed if name not in own}
    return closed | {"additionalProperties": rest}
