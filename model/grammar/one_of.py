"""oneOf -> anyOf, where no answer can fit two of its schemas.

The grammar engine follows anyOf.  An answer that follows one of the schemas must fit none of the others, so this proves
for every two of them that they have no value in common, or takes a property that one of them requires away from the
other.  Takes schemas as `schema_reader` leaves them.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from persimmon.model.grammar.schema_reader import OneOf
from persimmon.model.grammar.value_shapes import Shape, Shapes
from persimmon.model.grammar_spec import GrammarError

_MAX_TAGS = 8  # properties that are tried as the one that distinguishes alternatives
_OF_LITERALS = {"const", "enum", "type"}
_NAMED = ("properties", "patternProperties", "$defs")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLE = ("items", "additionalItems", "additionalProperties", "unevaluatedProperties")


def separate_alternatives(root: dict[str, Any]) -> dict[str, Any]:
    """The same schema without oneOf.

    Args:
        root: the schema, its definitions under $defs; changed in place.

    Raises:
        GrammarError: several schemas of a oneOf may fit one value.
    """
    found = [node for node in _nodes(root) if "oneOf" in node]
    if not found:
        return root
    shapes = Shapes(root)
    # All is decided before anything changes: alternatives are compared as the client wrote them.
    options = [_separate(node, shapes) for node in found]
    for node, alternatives in zip(found, options, strict=True):
        _replace(node, alternatives)
    return root


def _replace(node: dict[str, Any], alternatives: list[Any]) -> None:
    items = list(node.items())
    both = "anyOf" in node
    node.clear()
    # The engine takes keywords in their order, so oneOf's place is kept.
    for key, value in items:
        if key != "oneOf":
            node[key] = value
        elif not both:
            node["anyOf"] = alternatives
    if both:
        node["allOf"] = [*node.get("allOf", ()), {"anyOf": alternatives}]


def _separate(node: dict[str, Any], shapes: Shapes) -> list[Any]:
    """The schemas of a node's oneOf, changed so that no value fits two of them."""
    one_of: OneOf = node["oneOf"]
    # Every value has to fit the schema around them too.
    around = {key: value for key, value in node.items() if key not in ("oneOf", "anyOf", "$defs")}
    each = [shapes.of({"allOf": [option, around]}) for option in one_of]
    tags = _tagged(each, shapes)
    if len(tags) == len(each) and all(option.keys() <= _OF_LITERALS for option in one_of if isinstance(option, dict)):
        values = [shape.literals for own in each for shape in own]
        if all(own is not None for own in values):
            return [{"enum": [value for own in values if own is not None for value in own.values()]}]
    absent: list[dict[str, bool]] = [{} for _ in one_of]
    for first, second in _pairs(len(one_of), tags):
        if shapes.disjoint(each[first], each[second]):
            continue
        for one, other in ((first, second), (second, first)):
            name = _only_in(each[other], each[one])
            if name is None:
                raise GrammarError(
                    f"the JSON schema at {one_of.place[:200]} is not supported: one value may match both its schemas "
                    f"{first} and {second}; give each a required property with a different const, or use anyOf"
                )
            absent[one][name] = False
    return [
        {"allOf": [option, {"properties": names}]} if names else option
        for option, names in zip(one_of, absent, strict=True)
    ]


def _pairs(count: int, tags: Collection[int]) -> Iterator[tuple[int, int]]:
    """All pairs of alternatives but those that tags keep apart."""
    for second in range(count):
        for first in range(second) if second not in tags else [one for one in range(second) if one not in tags]:
            yield first, second


def _tagged(each: Sequence[list[Shape]], shapes: Shapes) -> frozenset[int]:
    """Alternatives that have no value in common since they list their values, or those of one required property."""
    names = {name: None for own in each for shape in own[:1] for name in sorted(shape.required)}
    best = frozenset[int]()
    for name in (None, *list(names)[:_MAX_TAGS]):
        seen: set[str] = set()
        tagged: set[int] = set()
        for index, own in enumerate(each):
            values = shapes.literals(own, name)
            if values is not None and seen.isdisjoint(values):
                seen |= values
                tagged.add(index)
        best = max(best, frozenset(tagged), key=len)
        if len(best) == len(each):
            break
    return best


def _only_in(needing: Sequence[Shape], other: Sequence[Shape]) -> str | None:
    """A property that objects of some shapes must have, and those of others need not have."""
    if not needing or any(not shape.types <= {"object"} for shape in needing):
        return None
    required = frozenset.intersection(*(shape.required for shape in needing))
    kept = frozenset[str]().union(*(shape.required for shape in other))
    names = sorted(required - kept)
    # One that the others do not list is missed least.
    return min(names, key=lambda name: (any(name in shape.properties for shape in other), name), default=None)


def _nodes(schema: Any) -> Iterator[dict[str, Any]]:
    """All schemas within a schema that are objects, itself included."""
    if not isinstance(schema, dict):
        return
    yield schema
    for key, value in schema.items():
        if key in _NAMED:
            parts = list(value.values())
        elif key in _LISTS and isinstance(value, list):
            parts = value
        else:
            parts = [value] if key in _SINGLE else []
        for part in parts:
            yield from _nodes(part)
