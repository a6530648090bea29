"""Reads a client's JSON Schema keyword by keyword: checks it, renumbers its references, leaves out what says nothing.

The result has the keywords of the grammar engine, and two that later steps replace: oneOf and unevaluatedProperties.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, NoReturn

from persimmon.model.grammar.formats import FORMATS, IMPLIED, without_lookaround
from persimmon.model.grammar.json_text import shown, type_name
from persimmon.model.grammar.number_bounds import MAX_INTEGER, MAX_NUMBER, narrow_bounds
from persimmon.model.grammar.plain_schema import plain_schema
from persimmon.model.grammar.references import References, Target, base_within
from persimmon.model.grammar_spec import GrammarError

MAX_PROPERTIES = 1_000
"""Of one object.  One that may leave them all out is followed in four times as many places at once."""

MAX_COUNTED_PROPERTIES = 40
"""Limit for objects with minProperties or maxProperties, because every allowed combination is written out."""

MAX_PATTERN_PROPERTIES = 16
"""Of one object: each is compared with each, and an automaton is made for it."""

MAX_ENUM_CONTAINERS = 1_000
"""Objects and arrays in one enum, each followed on its own."""

MAX_PATTERN_BYTES = 1_024
MAX_PATTERNS_BYTES = 8_192
"""Of one regular expression, and of a schema's together.  A step of one costs the square of its length."""

MAX_DIVISOR = 1_000
"""Of the digits of multipleOf, its point left out: an automaton has a state for each remainder."""

MAX_COUNT = 2**31 - 1
"""Of minLength, maxItems and so on, which are counted, not written out."""

MAX_LITERAL = 2**53
"""Of a number in const, enum and multipleOf: the engine has them in double precision."""

TYPES = ("null", "boolean", "number", "integer", "string", "array", "object")

_LEAVE_OUT = "leave it out and check the answer"
UNSUPPORTED = {
    "not": "list the allowed values instead",
    "if": "write the cases as anyOf",
    "then": "write the cases as anyOf",
    "else": "write the cases as anyOf",
    "dependencies": "write the cases as anyOf",
    "dependentRequired": "write the cases as anyOf",
    "dependentSchemas": "write the cases as anyOf",
    "uniqueItems": f"{_LEAVE_OUT}, or allow one item (maxItems)",
    "contains": _LEAVE_OUT,
    "minContains": _LEAVE_OUT,
    "maxContains": _LEAVE_OUT,
    "propertyNames": "only listed names are supported, or a pattern, a format or lengths without properties next to "
    "them",
    "unevaluatedItems": "use items",
    "$dynamicRef": "use $ref",
    "$recursiveRef": "use $ref",
}
"""Keywords that cannot be enforced, unless their value says nothing, with what to do.

Keywords that are neither here nor read, `title` for one, say nothing of a value.
"""


_FORMAT_PATTERNS = frozenset(FORMATS.values())
_SAYS_NOTHING = object()


class OneOf(list[Any]):
    """The schemas of a oneOf, and where it is in the client's schema."""

    def __init__(self, schemas: list[Any], place: str) -> None:
        super().__init__(schemas)
        self.place = place


class SchemaReader:
    """Reads one schema, and after it the schemas that it refers to.

    Args:
        root: the document.
    """

    def __init__(self, root: dict[str, Any] | bool) -> None:
        self._root = root
        self._references = References(root)
        self._base = self._references.base
        self._definitions: list[tuple[Target, str]] = []
        self._names: dict[int, str] = {}
        self._pattern_bytes = 0
        self._keywords: dict[str, Callable[[Any, str], Any]] = {
            "type": self._type,
            "const": self._literal,
            "enum": self._enum,
            "$ref": self._reference,
            "format": self._format,
            "pattern": self._pattern,
            "required": self._required,
            "multipleOf": self._multiple_of,
            "items": self._items,
            "oneOf": self._one_of,
            **dict.fromkeys(("additionalItems", "additionalProperties", "unevaluatedProperties"), self._schema),
            **dict.fromkeys(("allOf", "anyOf", "prefixItems"), self._schemas),
            **dict.fromkeys(("properties", "patternProperties"), self._named_schemas),
            **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), self._bound),
            **dict.fromkeys(
                ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), self._count
            ),
        }

    def read(self) -> dict[str, Any]:
        """The whole schema: an object, its definitions under $defs.

        Raises:
            GrammarError: it is not a valid JSON Schema, or asks for something that cannot be enforced.
        """
        root = self._read(self._root, "", self._base)
        schema: dict[str, Any] = root if isinstance(root, dict) else {} if root else {"enum": []}
        definitions: dict[str, Any] = {}
        while len(definitions) < len(self._definitions):
            (target, base), place = self._definitions[len(definitions)]
            definitions[str(len(definitions))] = self._read(target, place, base)
        return {**schema, "$defs": definitions} if definitions else schema

    def _schema(self, schema: Any, path: str) -> dict[str, Any] | bool:
        return self._read(schema, path, base_within(schema, self._base))

    def _read(self, schema: Any, path: str, base: str) -> dict[str, Any] | bool:
        """One schema, whose references are relative to `base`."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            _refuse(path, f"is {type_name(schema)}; expected a schema: an object, true or false")
        outer, self._base = self._base, base
        plain = plain_schema(schema, self._followed)
        if isinstance(plain, dict):
            plain = self._keys(plain, path)
        self._base = outer
        return plain

    def _keys(self, schema: dict[str, Any], path: str) -> dict[str, Any]:
        if schema.get("pattern") in IMPLIED.get(str(schema.get("format")), ()):
            del schema["pattern"]
        reduced: dict[str, Any] = {}
        for key, value in schema.items():
            place = f"{path}/{key}"
            if key in UNSUPPORTED:
                _refuse(place, f"is not supported; {UNSUPPORTED[key]}")
            if key in self._keywords and (read := self._keywords[key](value, place)) is not _SAYS_NOTHING:
                reduced[key] = read
        if (bound := narrow_bounds(reduced)) is not None:
            _refuse(
                f"{path}/{bound}",
                f"allows only numbers beyond ±{MAX_NUMBER}, or ±{MAX_INTEGER} for integers, which are not supported",
            )
        self._check_object(reduced, path)
        return reduced

    def _check_object(self, schema: dict[str, Any], path: str) -> None:
        required = {*schema.get("required", ())}
        count = len(required.union(schema.get("properties", ())))
        if count > MAX_PROPERTIES:
            _refuse(path, f"has {count} properties; at most {MAX_PROPERTIES} are allowed")
        if len(schema.get("patternProperties", ())) > MAX_PATTERN_PROPERTIES:
            _refuse(path, f"has more than {MAX_PATTERN_PROPERTIES} patternProperties")
        if "minProperties" not in schema and "maxProperties" not in schema:
            return
        if count > MAX_COUNTED_PROPERTIES:
            _refuse(path, f"has minProperties or maxProperties and more than {MAX_COUNTED_PROPERTIES} properties")
        # Two properties of one name would count as two, since the engine does not remember names that are not listed.
        if schema.get("minProperties", 0) > len(required) + 1:
            _refuse(f"{path}/minProperties", f"can be at most {len(required) + 1} here, one more than are required")

    def _schemas(self, schemas: Any, path: str) -> list[dict[str, Any] | bool]:
        if not isinstance(schemas, list):
            _refuse(path, f"is {type_name(schemas)}; expected an array of schemas")
        return [self._schema(schema, f"{path}/{index}") for index, schema in enumerate(schemas)]

    def _items(self, items: Any, path: str) -> list[dict[str, Any] | bool] | dict[str, Any] | bool:
        return self._schemas(items, path) if isinstance(items, list) else self._schema(items, path)

    def _one_of(self, schemas: Any, path: str) -> OneOf:
        return OneOf(self._schemas(schemas, path), path)

    def _named_schemas(self, schemas: Any, path: str) -> dict[str, dict[str, Any] | bool]:
        if not isinstance(schemas, dict):
            _refuse(path, f"is {type_name(schemas)}; expected an object of schemas")
        if path.endswith("/patternProperties"):
            for pattern in schemas:
                self._pattern(pattern, path)
        # Names that propertyNames lists share one schema, which is then written once.
        uses = Counter(id(schema) for schema in schemas.values() if isinstance(schema, dict) and schema)
        return {
            name: self._definition(Target(schema, base_within(schema, self._base)), f"{path}/{name}")
            if uses[id(schema)] > 1
            else self._schema(schema, f"{path}/{name}")
            for name, schema in schemas.items()
        }

    def _reference(self, reference: Any, path: str) -> str:
        if not isinstance(reference, str):
            _refuse(path, f"is {shown(reference)}; expected a string")
        target = self._references.find(reference, self._base)
        if target is None and not reference.startswith("#"):
            _refuse(
                path, f"is {shown(reference)}; only references within the schema are supported, like '#/$defs/name'"
            )
        if target is None:
            raise GrammarError(f"the JSON schema refers to {shown(reference)}, which is not in it")
        reduced: str = self._definition(target, reference)["$ref"]
        return reduced

    def _definition(self, target: Target, place: str) -> dict[str, Any]:
        """A reference to a schema, which is read later."""
        if target.schema is self._root:
            return {"$ref": "#"}
        name = self._names.get(id(target.schema))
        if name is None:
            name = self._names[id(target.schema)] = str(len(self._definitions))
            self._definitions.append((target, place))
        return {"$ref": f"#/$defs/{name}"}

    def _followed(self, reference: str) -> Any:
        target = self._references.find(reference, self._base)
        return None if target is None else target.schema

    def _type(self, value: Any, path: str) -> Any:
        names = value if isinstance(value, list) else [value]
        if not names or not all(name in TYPES for name in names) or len(set(names)) < len(names):
            _refuse(path, f"is {shown(value)}; expected one or several of {', '.join(TYPES)}")
        return value

    def _enum(self, values: Any, path: str) -> list[Any]:
        if not isinstance(values, list):
            _refuse(path, f"is {type_name(values)}; expected an array")
        if sum(isinstance(value, (dict, list)) for value in values) > MAX_ENUM_CONTAINERS:
            _refuse(path, f"has more than {MAX_ENUM_CONTAINERS} objects and arrays")
        return [self._literal(value, path) for value in values]

    def _literal(self, value: Any, path: str) -> Any:
        for part in _parts(value):
            if isinstance(part, str):
                control = next((char for char in part if _is_control(char)), None)
                if control is not None:
                    _refuse(path, f"contains the control character U+{ord(control):04X}, which answers never contain")
            elif isinstance(part, dict) and len(part) > MAX_PROPERTIES:
                _refuse(path, f"contains an object with {len(part)} properties; at most {MAX_PROPERTIES} are allowed")
            elif isinstance(part, (int, float)) and not isinstance(part, bool):
                _check_number(part, path)
        return value

    def _bound(self, value: Any, path: str) -> Any:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            _refuse(path, f"has {shown(value)}; expected a number")
        return value

    def _multiple_of(self, value: Any, path: str) -> Any:
        _check_number(value, path)
        digits = Decimal(repr(value)).normalize().as_tuple().digits
        if value <= 0 or int("".join(map(str, digits))) > MAX_DIVISOR or int(value) > MAX_DIVISOR:
            _refuse(
                path, f"is {shown(value)}; its digits must form a number from 1 to {MAX_DIVISOR}, like 5, 250 or 0.01"
            )
        return value

    def _count(self, value: Any, path: str) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_COUNT:
            _refuse(path, f"is {shown(value)}; expected a whole number from 0 to {MAX_COUNT}")
        return value

    def _pattern(self, pattern: Any, path: str) -> str:
        if not isinstance(pattern, str):
            _refuse(path, f"is {type_name(pattern)}; expected a regular expression, a string")
        if pattern in _FORMAT_PATTERNS:  # as propertyNames may have one
            return str(pattern)
        known = without_lookaround(pattern)
        size = len(known.encode())
        self._pattern_bytes += size
        if size > MAX_PATTERN_BYTES or self._pattern_bytes > MAX_PATTERNS_BYTES:
            _refuse(
                path,
                f"is too long: a regular expression may have {MAX_PATTERN_BYTES} bytes, and those of a schema "
                f"{MAX_PATTERNS_BYTES} together",
            )
        return known

    def _format(self, name: Any, path: str) -> Any:
        if name == "regex":
            _refuse(path, f"is {name!r}; expected one of {', '.join(FORMATS)}")
        # Others are not JSON Schema's, and so say nothing of a value.
        return name if isinstance(name, str) and name in FORMATS else _SAYS_NOTHING

    def _required(self, names: Any, path: str) -> list[str]:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            _refuse(path, f"is {shown(names)}; expected an array of strings")
        return names


def _refuse(path: str, reason: str) -> NoReturn:
    raise GrammarError(f"the JSON schema{f' at {path[:200]}' if path else ''} {reason}")


def _check_number(value: Any, path: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > MAX_LITERAL:
        _refuse(path, f"has {shown(value)}; expected a number from -{MAX_LITERAL} to {MAX_LITERAL}")


def _is_control(char: str) -> bool:
    return (char < " " and char not in "\b\t\n\f\r") or char == "\x7f"


def _parts(value: Any) -> Iterator[Any]:
    """A value of JSON, and all values within it."""
    yield value
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _parts(item)
