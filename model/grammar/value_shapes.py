"""What values that fit a JSON Schema have in common, and whether two schemas can have a value in common.

Decides only what is plain to see: types, literals, ranges, counts, names that objects must or cannot have, and the
values of required properties.  Patterns and formats are not looked at.  Takes schemas as `schema_reader` leaves them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from persimmon.model.grammar.number_bounds import MAX_NUMBER, MIN_FRACTION
from persimmon.model.grammar_spec import GrammarError

MAX_SHAPES = 64
"""Of one schema.  One with more alternatives counts as one that allows anything."""

MAX_STEPS = 30_000
"""Comparisons of shapes for one schema, of about 5 microseconds each."""

_MAX_LEVELS = 4  # of properties within properties that are compared
_INFINITY = float("inf")
_ATOMS = {"number": ("integer", "fraction")}
_ALL_TYPES = frozenset(("null", "boolean", "integer", "fraction", "string", "array", "object"))

_Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Shape:
    """What all values of one alternative of a schema have in common.

    Attributes:
        types: of JSON, numbers as "integer" and "fraction".
        literals: all values, as `canonical` writes them, if they are listed.
        numbers, lengths, counts: the range of numbers, of the lengths of strings and of arrays.
        required: names that objects have.
        properties: the schemas of an object's properties that are listed.
        names: all names that objects may have; None if they may have others.
        prefix: the schemas of an array's first items.
    """

    types: frozenset[str] = _ALL_TYPES
    literals: Mapping[str, Any] | None = None
    numbers: _Range = (-_INFINITY, _INFINITY)
    lengths: _Range = (0, _INFINITY)
    counts: _Range = (0, _INFINITY)
    required: frozenset[str] = frozenset()
    properties: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    names: frozenset[str] | None = None
    prefix: tuple[tuple[Any, ...], ...] = ()

    @property
    def is_object(self) -> bool:
        """Whether all values are objects."""
        return self.types == {"object"}


class Shapes:
    """Finds and compares the shapes of the schemas of one document.

    Args:
        root: the document, its definitions under $defs.
    """

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._known: dict[str, list[Shape]] = {}
        self._steps = 0

    def of(self, schema: Any) -> list[Shape]:
        """The alternatives of a schema: a value that fits it has one of these shapes."""
        if isinstance(schema, bool):
            return [Shape()] if schema else []
        self._count()
        shapes = [_own_shape(schema)]
        for key, value in schema.items():
            match key:
                case "$ref":
                    shapes = _both(shapes, self._referred(value))
                case "allOf":
                    for part in value:
                        shapes = _both(shapes, self.of(part))
                case "anyOf" | "oneOf":
                    shapes = _both(shapes, _few([shape for part in value for shape in self.of(part)]))
        return shapes

    def literals(self, shapes: Sequence[Shape], name: str | None) -> set[str] | None:
        """All values that values of some shapes may have, or that their property of a name may have.

        Args:
            shapes: any.
            name: of a property; None for the values themselves.

        Returns:
            The values as `canonical` writes them; None if they are not listed, or if objects may lack the property.
        """
        values: set[str] = set()
        for shape in shapes:
            if name is None:
                inner = [shape]
            elif shape.is_object and name in shape.required and name in shape.properties:
                inner = self._property(shape, name)
            else:
                return None
            for own in inner:
                if own.literals is None:
                    return None
                values.update(own.literals)
        return values

    def disjoint(self, left: Sequence[Shape], right: Sequence[Shape], level: int = 0) -> bool:
        """Whether no value has a shape of both; False where that is not known.

        Raises:
            GrammarError: too much has been compared.
        """
        return all(self._disjoint(one, other, level) for one in left for other in right)

    def _count(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise GrammarError("the JSON schema has too many alternatives in oneOf to compare; use anyOf")

    def _disjoint(self, left: Shape, right: Shape, level: int) -> bool:
        self._count()
        common = left.types & right.types
        if not common:
            return True
        if left.literals is not None and right.literals is not None:
            return left.literals.keys().isdisjoint(right.literals)
        for one, other in ((left, right), (right, left)):
            if one.literals is not None and len(one.literals) <= MAX_SHAPES and level < _MAX_LEVELS:
                return all(self._disjoint(_literal_shape(value), other, level + 1) for value in one.literals.values())
        return all(self._disjoint_within(name, left, right, level) for name in common)

    def _disjoint_within(self, type_name: str, left: Shape, right: Shape, level: int) -> bool:
        match type_name:
            case "integer" | "fraction":
                return _apart(left.numbers, right.numbers)
            case "string":
                return _apart(left.lengths, right.lengths)
            case "array":
                sure = int(min(max(left.counts[0], right.counts[0]), len(left.prefix), len(right.prefix)))
                return _apart(left.counts, right.counts) or any(
                    self._parts_disjoint(left.prefix[index], right.prefix[index], level) for index in range(sure)
                )
            case "object":
                return any(self._name_decides(name, left, right, level) for name in left.required | right.required)
        return False

    def _name_decides(self, name: str, left: Shape, right: Shape, level: int) -> bool:
        """Whether objects that have a property fit at most one of two shapes."""
        for shape in (left, right):
            if shape.names is not None and name not in shape.names:
                return True
        return self._parts_disjoint(left.properties.get(name, ()), right.properties.get(name, ()), level)

    def _parts_disjoint(self, left: tuple[Any, ...], right: tuple[Any, ...], level: int) -> bool:
        if level >= _MAX_LEVELS:
            return False
        return self.disjoint(self.of({"allOf": left}), self.of({"allOf": right}), level + 1)

    def _property(self, shape: Shape, name: str) -> list[Shape]:
        return self.of({"allOf": shape.properties[name]})

    def _referred(self, reference: str) -> list[Shape]:
        if reference not in self._known:
            self._known[reference] = [Shape()]  # what refers to itself may be anything
            target = self._root if reference == "#" else self._root["$defs"][reference.rpartition("/")[2]]
            self._known[reference] = self.of(target)
        return self._known[reference]


def canonical(value: Any) -> str:
    """JSON that is the same for equal values: numbers without a needless point, names in order."""
    return json.dumps(_canonical(value), sort_keys=True)


def _canonical(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return {name: _canonical(item) for name, item in value.items()} if isinstance(value, dict) else value


def _own_shape(schema: Mapping[str, Any]) -> Shape:
    types = schema.get("type")
    names = [types] if isinstance(types, str) else types
    literals = None
    for key in ("const", "enum"):
        if key in schema:
            values = {canonical(value): value for value in ([schema[key]] if key == "const" else schema[key])}
            literals = values if literals is None else {text: literals[text] for text in literals if text in values}
    properties = schema.get("properties", {})
    closed = schema.get("additionalProperties") is False and not schema.get("patternProperties")
    shape = Shape(
        types=_ALL_TYPES if names is None else frozenset(atom for name in names for atom in _ATOMS.get(name, (name,))),
        literals=None,
        numbers=(
            max(_bound(schema, "minimum", -_INFINITY), _bound(schema, "exclusiveMinimum", -_INFINITY)),
            min(_bound(schema, "maximum", _INFINITY), _bound(schema, "exclusiveMaximum", _INFINITY)),
        ),
        lengths=(schema.get("minLength", 0), schema.get("maxLength", _INFINITY)),
        counts=(schema.get("minItems", 0), schema.get("maxItems", _INFINITY)),
        required=frozenset(schema.get("required", ())),
        properties={name: (part,) for name, part in properties.items()},
        names=frozenset(name for name, part in properties.items() if part is not False) if closed else None,
        prefix=tuple((part,) for part in schema.get("prefixItems", ())),
    )
    return shape if literals is None else _of_literals(shape, literals)


def _bound(schema: Mapping[str, Any], key: str, otherwise: float) -> float:
    # The largest bounds and tiny fractions may have been moved inwards, from where we do not know.
    value: float = schema.get(key, otherwise)
    return otherwise if abs(value) >= MAX_NUMBER else 0 if abs(value) <= MIN_FRACTION else value


def _of_literals(shape: Shape, literals: Mapping[str, Any]) -> Shape:
    kept = {text: value for text, value in literals.items() if _type_of(value) in shape.types}
    types = frozenset(map(_type_of, kept.values()))
    return Shape(
        types=types,
        literals=kept,
        numbers=shape.numbers,
        lengths=shape.lengths,
        counts=shape.counts,
        required=shape.required,
        properties=shape.properties,
        names=shape.names,
        prefix=shape.prefix,
    )


def _literal_shape(value: Any) -> Shape:
    """The shape of one value, its parts spelled out."""
    kind = frozenset({_type_of(value)})
    if isinstance(value, dict):
        properties = {name: ({"const": item},) for name, item in value.items()}
        return Shape(kind, required=frozenset(value), properties=properties, names=frozenset(value))
    if isinstance(value, list):
        prefix = tuple(({"const": item},) for item in value)
        return Shape(kind, counts=(len(value), len(value)), prefix=prefix)
    if isinstance(value, str):
        return Shape(kind, lengths=(len(value), len(value)))
    return Shape(kind, numbers=(value, value)) if kind & {"integer", "fraction"} else Shape(kind)


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "integer" if float(value).is_integer() else "fraction"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def _apart(left: _Range, right: _Range) -> bool:
    return left[1] < right[0] or right[1] < left[0]


def _few(shapes: list[Shape]) -> list[Shape]:
    return shapes if len(shapes) <= MAX_SHAPES else [Shape()]


def _both(left: list[Shape], right: list[Shape]) -> list[Shape]:
    """Values that have a shape of both."""
    if len(left) * len(right) > MAX_SHAPES:
        return [Shape()]
    met = (_meet(one, other) for one in left for other in right)
    return [shape for shape in met if shape.types]


def _meet(left: Shape, right: Shape) -> Shape:
    literals = left.literals if right.literals is None else right.literals
    if left.literals is not None and right.literals is not None:
        literals = {text: value for text, value in left.literals.items() if text in right.literals}
    names = left.names if right.names is None else right.names
    if left.names is not None and right.names is not None:
        names = left.names & right.names
    shape = Shape(
        types=left.types & right.types,
        literals=None,
        numbers=_overlap(left.numbers, right.numbers),
        lengths=_overlap(left.lengths, right.lengths),
        counts=_overlap(left.counts, right.counts),
        required=left.required | right.required,
        properties={
            name: left.properties.get(name, ()) + right.properties.get(name, ())
            for name in {**left.properties, **right.properties}
        },
        names=names,
        prefix=tuple(_pairs(left.prefix, right.prefix)),
    )
    return shape if literals is None else _of_literals(shape, literals)


def _overlap(left: _Range, right: _Range) -> _Range:
    return max(left[0], right[0]), min(left[1], right[1])


def _pairs(left: Sequence[tuple[Any, ...]], right: Sequence[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    for index in range(max(len(left), len(right))):
        yield (left[index] if index < len(left) else ()) + (right[index] if index < len(right) else ())
