"""How much the grammar engine would build for a JSON Schema, counted before it does.

The engine has limits of its own, but they do not count what it copies when it combines schemas, nor how deep references
lead.  So this goes through a schema as the engine does, and copies nothing.  Takes schemas as `json_schema`
leaves them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from persimmon.model.grammar.formats import FORMATS
from persimmon.model.grammar_spec import GrammarError

MAX_NODES = 40_000
"""Nodes of the schema as it is written out.  One takes the engine about 20 microseconds and 5 KiB, at worst."""

MAX_LEVELS = 64
"""Schemas within schemas, references followed.  One level takes the engine about 9 KiB of its stack."""

MAX_CONJUNCTS = 4
"""Patterns, formats and bounds of length for one string.  The states of their automata multiply."""

_TYPES = ("null", "boolean", "number", "string", "array", "object")
_APPLICATORS = ("const", "enum", "allOf", "anyOf", "oneOf", "$ref")
_LENGTHS = {"minLength", "maxLength"}
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}

_Kind = Literal["any", "never", "union", "reference", "null", "boolean", "number", "string", "array", "object"]


def check_size(schema: Mapping[str, Any]) -> None:
    """Refuses what would take the engine too much time, memory or stack.

    Args:
        schema: as `json_schema.read_schema` reduces it.

    Raises:
        GrammarError: it is too large when written out.
    """
    _Count(schema).all()


@dataclass(frozen=True, slots=True, eq=False)
class _Tree:
    """What the engine builds for a schema, without its contents.

    Attributes:
        kind: a type of JSON, or how others are combined.
        weight: the cost of this node without its children, in nodes.
        options: of a union.
        exclusive: whether a union is a oneOf, whose options are compared, each with each.
        target: of a reference.
        properties, patterns: of an object.
        prefix: of an array: items that have schemas of their own.
        rest: of all other items or properties; None where they may be anything.
        required: names that an object has; those without a schema have that of the rest.
        conjuncts: what one string has to fit.
        divides: whether a number has a multipleOf.
        size: of this and all within it.
    """

    kind: _Kind
    weight: int = 1
    options: tuple["_Tree", ...] = ()
    exclusive: bool = False
    target: str = ""
    properties: Mapping[str, "_Tree"] = field(default_factory=dict)
    patterns: Mapping[str, "_Tree"] = field(default_factory=dict)
    prefix: tuple["_Tree", ...] = ()
    rest: "_Tree | None" = None
    required: frozenset[str] = frozenset()
    conjuncts: int = 0
    divides: bool = False
    size: int = field(init=False)

    def __post_init__(self) -> None:
        parts = (*self.options, *self.prefix, *self.properties.values(), *self.patterns.values())
        size = self.weight + sum(part.size for part in parts)
        if self.rest is not None:
            size += self.rest.size * (1 + len(self.required - self.properties.keys()))
        object.__setattr__(self, "size", size)

    def property(self, name: str) -> "_Tree":
        """What a property has to fit.  Where patterns decide that, the largest that it may be."""
        if name in self.properties:
            return self.properties[name]
        return max((*self.patterns.values(), self.rest or _ANY), key=lambda tree: tree.size)

    def pattern(self, pattern: str) -> "_Tree":
        """What properties of a pattern have to fit."""
        return self.patterns.get(pattern, self.rest or _ANY)

    def item(self, index: int) -> "_Tree":
        """What an array's item has to fit."""
        return self.prefix[index] if index < len(self.prefix) else self.rest or _ANY


_ANY = _Tree("any")
_NEVER = _Tree("never")


class _Count:
    """Goes through one schema and counts nodes: those built, and those copied on the way.

    Args:
        root: the schema, its definitions under $defs.
    """

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._nodes = 0
        self._definitions: dict[str, _Tree | None] = {}

    def all(self) -> None:
        """The whole schema.

        Raises:
            GrammarError: once there are too many nodes.
        """
        self._add(self._schema(self._root, 0).size)

    def _add(self, nodes: int) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise GrammarError("the JSON schema is too large after its references and alternatives are expanded")

    def _schema(self, schema: Mapping[str, Any] | bool, level: int) -> _Tree:
        self._add(1)
        if level > MAX_LEVELS:
            raise GrammarError(
                f"the JSON schema is nested more than {MAX_LEVELS} levels deep after its references are followed"
            )
        if isinstance(schema, bool):
            return _ANY if schema else _NEVER
        # The engine takes keywords in their order: those between two applicators together, always with the type.
        result, assertions = _ANY, dict[str, Any]()
        for key, value in schema.items():
            if key in _APPLICATORS:
                if assertions:
                    result = self._meet(result, self._assertions({**assertions, **_type(schema)}, level), 0)
                    assertions = {}
                for tree in self._applied(key, value, level):
                    result = self._meet(result, tree, 0)
            elif key != "$defs":
                assertions[key] = value
        if assertions:
            result = self._meet(result, self._assertions({**assertions, **_type(schema)}, level), 0)
        return result

    def _applied(self, key: str, value: Any, level: int) -> list[_Tree]:
        if key == "$ref":
            return [self._reference(value, level)]
        if key == "const":
            return [_literal(value)]
        if key == "enum":
            return [self._union([_literal(entry) for entry in value])]
        trees = [self._schema(entry, level + 1) for entry in value]
        return trees if key == "allOf" else [self._union(trees, exclusive=key == "oneOf")]

    def _reference(self, reference: str, level: int) -> _Tree:
        if reference not in self._definitions:
            self._definitions[reference] = None
            target = self._root if reference == "#" else self._root["$defs"][reference.rpartition("/")[2]]
            tree = self._schema(target, level + 1)
            self._definitions[reference] = tree
            self._add(tree.size)
        return _Tree("reference", target=reference)

    def _definition(self, reference: str) -> _Tree:
        tree = self._definitions[reference]
        if tree is None:
            raise GrammarError(
                "the JSON schema refers to itself in a schema that has other constraints next to that reference, "
                "which is not supported"
            )
        self._add(tree.size)
        return tree

    def _union(self, options: Sequence[_Tree], exclusive: bool = False) -> _Tree:
        flat = [
            inner
            for option in options
            for inner in (option.options if option.kind == "union" and option.exclusive == exclusive else (option,))
        ]
        if exclusive:
            self._add(len(flat) ** 2 // 32)
        elif any(option.kind == "any" for option in flat):
            return _ANY
        possible = tuple(option for option in flat if option.kind != "never")
        if len(possible) < 2:
            return possible[0] if possible else _NEVER
        return _Tree("union", options=possible, exclusive=exclusive)

    def _assertions(self, keys: Mapping[str, Any], level: int) -> _Tree:
        types = keys.get("type", _TYPES)
        return self._union([self._typed(name, keys, level) for name in ([types] if isinstance(types, str) else types)])

    def _typed(self, name: str, keys: Mapping[str, Any], level: int) -> _Tree:
        match name:
            case "null":
                return _Tree("null")
            case "boolean":
                return _Tree("boolean")
            case "number" | "integer":
                return _Tree("number", 12 if keys.keys() & _BOUNDS else 1, divides="multipleOf" in keys)
            case "string":
                return _string(keys)
            case "array":
                return self._array(keys, level)
            case _:
                return self._object(keys, level)

    def _array(self, keys: Mapping[str, Any], level: int) -> _Tree:
        items = keys.get("items")
        if isinstance(items, list):
            prefix, rest = items, keys.get("additionalItems")
        else:
            prefix, rest = keys.get("prefixItems", []), items
        return _Tree(
            "array", prefix=tuple(self._schema(item, level + 1) for item in prefix), rest=self._rest(rest, level)
        )

    def _object(self, keys: Mapping[str, Any], level: int) -> _Tree:
        properties = {name: self._schema(schema, level + 1) for name, schema in keys.get("properties", {}).items()}
        patterns = {name: self._schema(schema, level + 1) for name, schema in keys.get("patternProperties", {}).items()}
        required = frozenset(keys.get("required", ()))
        pairs = len(properties.keys() | required) ** 2
        counted = "minProperties" in keys or "maxProperties" in keys
        return _Tree(
            "object",
            1 + (pairs if counted else pairs // 500) + 50 * len(patterns) ** 2,
            properties=properties,
            patterns=patterns,
            rest=self._rest(keys.get("additionalProperties"), level),
            required=required,
        )

    def _rest(self, schema: Mapping[str, Any] | bool | None, level: int) -> _Tree | None:
        return None if schema is None else self._schema(schema, level + 1)

    def _meet(self, left: _Tree, right: _Tree, level: int) -> _Tree:
        """What fits both.  Whatever the engine copies for it is counted."""
        self._add(1)
        if level > MAX_LEVELS:
            raise GrammarError("the JSON schema combines schemas that are nested too deeply")
        if left.kind == "any" or right.kind == "never":
            return right
        if right.kind == "any" or left.kind == "never":
            return left
        for one, other in ((left, right), (right, left)):
            if one.kind == "reference":
                return self._meet(self._definition(one.target), other, level + 1)
        for one, other in ((left, right), (right, left)):
            if one.kind == "union":
                self._add(other.size * len(one.options))
                return self._union([self._meet(option, other, level + 1) for option in one.options], one.exclusive)
        return _NEVER if left.kind != right.kind else self._merge(left, right, level + 1)

    def _merge(self, left: _Tree, right: _Tree, level: int) -> _Tree:
        """What fits two of one type."""
        conjuncts = left.conjuncts + right.conjuncts
        if conjuncts > MAX_CONJUNCTS:
            raise GrammarError(
                f"the JSON schema has more than {MAX_CONJUNCTS} patterns, formats and bounds of length for one string"
            )
        if left.divides and right.divides:
            raise GrammarError("the JSON schema has two values of multipleOf for one number, which is not supported")

        def both(one: _Tree, other: _Tree) -> _Tree:
            self._add(one.size + other.size)
            return self._meet(one, other, level)

        rest = left.rest or right.rest
        if left.rest is not None and right.rest is not None:
            rest = both(left.rest, right.rest)
        return _Tree(
            left.kind,
            left.weight + right.weight + (_EMPTINESS if left.conjuncts and right.conjuncts else 0),
            properties={
                name: both(left.property(name), right.property(name))
                for name in {**left.properties, **right.properties}
            },
            patterns={
                pattern: both(left.pattern(pattern), right.pattern(pattern))
                for pattern in {**left.patterns, **right.patterns}
            },
            prefix=tuple(
                both(left.item(index), right.item(index)) for index in range(max(len(left.prefix), len(right.prefix)))
            ),
            rest=rest,
            required=left.required | right.required,
            conjuncts=conjuncts,
            divides=left.divides or right.divides,
        )


_FORMAT = 15  # the engine builds equal expressions once
_FORMAT_PATTERNS = frozenset(FORMATS.values())
_EMPTINESS = 50  # an automaton is searched to know whether any string fits


def _type(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": schema["type"]} if "type" in schema else {}


def _string(keys: Mapping[str, Any]) -> _Tree:
    pattern = keys.get("pattern", "")
    conjuncts = int("pattern" in keys)
    if conjuncts and keys.keys() & _LENGTHS:
        conjuncts += 1
    weight = 1 + (_FORMAT if pattern in _FORMAT_PATTERNS else len(pattern) // 8) + _EMPTINESS * (conjuncts > 1)
    return _Tree("string", weight, conjuncts=conjuncts)


def _literal(value: Any) -> _Tree:
    if isinstance(value, dict):
        properties = {name: _literal(item) for name, item in value.items()}
        return _Tree("object", 2, properties=properties, rest=_NEVER, required=frozenset(properties))
    if isinstance(value, list):
        return _Tree("array", 2, prefix=tuple(_literal(item) for item in value), rest=_NEVER)
    if value is None:
        return _Tree("null")
    if isinstance(value, bool):
        return _Tree("boolean")
    return _Tree("string" if isinstance(value, str) else "number")
