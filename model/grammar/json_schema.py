"""A client's JSON Schema -> the same schema in the keywords that the grammar engine enforces, or a sentence why not.

What constrains nothing is left out, references are renumbered, and what cannot be enforced exactly is refused, so that
every answer that ends is valid.  Knows nothing of tokens; how large the result grows is `schema_size`'s business.
"""

import json
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, NoReturn
from urllib.parse import unquote

from model.grammar.schema_size import check_size
from model.grammar.spec import GrammarError

MAX_DEPTH = 64
"""Levels of JSON in what a client sends.  The engine reads twice as many."""

MAX_PROPERTIES = 1_000
"""Of one object.  One that may leave them all out is followed in four times as many places at once."""

MAX_COUNTED_PROPERTIES = 40
"""Of an object with minProperties or maxProperties: each way to have so many of them is written out."""

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

MAX_NUMBER = 2**53
"""Of a number in a schema: the engine has them in double precision."""

TYPES = ("null", "boolean", "number", "integer", "string", "array", "object")

FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
"""Formats of strings that are enforced."""

_OTHER_FORMATS = (
    *("idn-email", "idn-hostname", "iri", "iri-reference", "uri-reference", "uri-template"),
    *("json-pointer", "relative-json-pointer", "regex"),
)

UNSUPPORTED = (
    *("not", "if", "then", "else", "dependencies", "dependentRequired", "dependentSchemas", "uniqueItems"),
    *("contains", "minContains", "maxContains", "propertyNames", "unevaluatedItems", "unevaluatedProperties"),
    *("$dynamicRef", "$recursiveRef"),
)
"""Keywords that cannot be enforced.  All that are in neither list, `title` for one, say nothing of a value."""


def read_schema(text: str) -> dict[str, Any]:
    """A JSON Schema of the drafts 4 to 2020-12, reduced to what constrains an answer.

    Args:
        text: the schema as JSON.

    Raises:
        GrammarError: it is no JSON Schema, asks for what cannot be enforced, or is too large.
    """
    schema = read_json(text, "the JSON schema")
    if not isinstance(schema, (dict, bool)):
        raise GrammarError(f"the JSON schema is {_name(schema)}, needed is an object")
    try:
        reduced = _Reader(schema).read()
        check_size(reduced)
    except RecursionError:
        raise GrammarError("the JSON schema is nested too deeply") from None
    return reduced


def read_json(text: str, what: str) -> Any:
    """Strictly parsed JSON.

    Args:
        text: a client's.
        what: it is, for messages.

    Raises:
        GrammarError: it is not JSON, is nested too deeply, or holds a lone surrogate.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        deep = _deeper_than(value, MAX_DEPTH)
    except RecursionError:
        deep = True
    except UnicodeEncodeError:
        raise GrammarError(f"{what} holds a lone surrogate, which no text can") from None
    except ValueError as error:
        raise GrammarError(f"{what} is not valid JSON: {error}") from None
    if deep:
        raise GrammarError(f"{what} is nested in more than {MAX_DEPTH} levels, which is too deep")
    return value


class _Reader:
    """Reads one schema, its references after it.

    Args:
        root: the document.
    """

    def __init__(self, root: dict[str, Any] | bool) -> None:
        self._root = root
        self._names: dict[str, str] = {}
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
            **dict.fromkeys(("additionalItems", "additionalProperties"), self._schema),
            **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), self._schemas),
            **dict.fromkeys(("properties", "patternProperties"), self._named_schemas),
            **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), self._bound),
            **dict.fromkeys(
                ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), self._count
            ),
        }

    def read(self) -> dict[str, Any]:
        """The whole schema: an object, its definitions under $defs."""
        root = self._schema(self._root, "")
        schema: dict[str, Any] = root if isinstance(root, dict) else {} if root else {"enum": []}
        definitions: dict[str, Any] = {}
        while len(definitions) < len(self._names):
            reference, name = list(self._names.items())[len(definitions)]
            definitions[name] = self._schema(self._resolve(reference), reference)
        return {**schema, "$defs": definitions} if definitions else schema

    def _schema(self, schema: Any, path: str) -> dict[str, Any] | bool:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            _refuse(path, f"is {_name(schema)}, where a schema is needed: an object, true or false")
        reduced: dict[str, Any] = {}
        for key, value in schema.items():
            place = f"{path}/{key}"
            if key in UNSUPPORTED and not (key == "uniqueItems" and value is False):
                _refuse(place, "is not supported")
            if key == "$id" and path:
                _refuse(place, "is not supported within a schema, only at its top")
            if key in self._keywords and (read := self._keywords[key](value, place)) is not None:
                reduced[key] = read
        self._check_object(reduced, path)
        return reduced

    def _check_object(self, schema: dict[str, Any], path: str) -> None:
        required = {*schema.get("required", ())}
        count = len(required.union(schema.get("properties", ())))
        if count > MAX_PROPERTIES:
            _refuse(path, f"has {count} properties, at most {MAX_PROPERTIES} are possible")
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
            _refuse(path, f"is {_name(schemas)}, needed is an array of schemas")
        return [self._schema(schema, f"{path}/{index}") for index, schema in enumerate(schemas)]

    def _items(self, items: Any, path: str) -> list[dict[str, Any] | bool] | dict[str, Any] | bool:
        return self._schemas(items, path) if isinstance(items, list) else self._schema(items, path)

    def _named_schemas(self, schemas: Any, path: str) -> dict[str, dict[str, Any] | bool]:
        if not isinstance(schemas, dict):
            _refuse(path, f"is {_name(schemas)}, needed is an object of schemas")
        if path.endswith("/patternProperties"):
            for pattern in schemas:
                self._pattern(pattern, path)
        return {name: self._schema(schema, f"{path}/{name}") for name, schema in schemas.items()}

    def _reference(self, reference: Any, path: str) -> str:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            _refuse(path, f"is {_shown(reference)}; supported are references within the schema, like '#/$defs/name'")
        if reference == "#":
            return reference
        self._resolve(reference)
        name = self._names.setdefault(reference, str(len(self._names)))
        return f"#/$defs/{name}"

    def _resolve(self, reference: str) -> Any:
        value: Any = self._root
        for part in reference.split("/")[1:]:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(value, dict) and key in value:
                value = value[key]
            elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
                value = value[int(key)]
            else:
                raise GrammarError(f"the JSON schema refers to {_shown(reference)}, which is not in it")
        return value

    def _type(self, value: Any, path: str) -> Any:
        names = value if isinstance(value, list) else [value]
        if not names or not all(name in TYPES for name in names) or len(set(names)) < len(names):
            _refuse(path, f"is {_shown(value)}, needed are one or several of {', '.join(TYPES)}")
        return value

    def _enum(self, values: Any, path: str) -> list[Any]:
        if not isinstance(values, list):
            _refuse(path, f"is {_name(values)}, needed is an array")
        if sum(isinstance(value, (dict, list)) for value in values) > MAX_ENUM_CONTAINERS:
            _refuse(path, f"has more than {MAX_ENUM_CONTAINERS} objects and arrays")
        return [self._literal(value, path) for value in values]

    def _literal(self, value: Any, path: str) -> Any:
        for part in _parts(value):
            if isinstance(part, str):
                control = next((char for char in part if _is_control(char)), None)
                if control is not None:
                    _refuse(path, f"holds the control character U+{ord(control):04X}, which answers never have")
            elif isinstance(part, dict) and len(part) > MAX_PROPERTIES:
                _refuse(path, f"holds an object with {len(part)} properties, at most {MAX_PROPERTIES} are possible")
            elif isinstance(part, (int, float)) and not isinstance(part, bool):
                _check_number(part, path)
        return value

    def _bound(self, value: Any, path: str) -> Any:
        # A Boolean is how draft 4 says that the bound beside it is exclusive.
        if not (isinstance(value, bool) and path.rpartition("/")[2].startswith("exclusive")):
            _check_number(value, path)
        return value

    def _multiple_of(self, value: Any, path: str) -> Any:
        _check_number(value, path)
        digits = Decimal(repr(value)).normalize().as_tuple().digits
        if value <= 0 or int("".join(map(str, digits))) > MAX_DIVISOR or int(value) > MAX_DIVISOR:
            _refuse(
                path, f"is {_shown(value)}; its digits must be a number from 1 to {MAX_DIVISOR}, like 5, 250 or 0.01"
            )
        return value

    def _count(self, value: Any, path: str) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_COUNT:
            _refuse(path, f"is {_shown(value)}, needed is a whole number from 0 to {MAX_COUNT}")
        return value

    def _pattern(self, pattern: Any, path: str) -> str:
        if not isinstance(pattern, str):
            _refuse(path, f"is {_name(pattern)}, needed is a regular expression, a string")
        self._pattern_bytes += len(pattern.encode())
        if len(pattern.encode()) > MAX_PATTERN_BYTES or self._pattern_bytes > MAX_PATTERNS_BYTES:
            _refuse(
                path,
                f"is too long: a regular expression may have {MAX_PATTERN_BYTES} bytes, and those of a schema "
                f"{MAX_PATTERNS_BYTES} together",
            )
        return pattern

    def _format(self, name: Any, path: str) -> str | None:
        if name in _OTHER_FORMATS:
            _refuse(path, f"is {name!r}; enforced are {', '.join(FORMATS)}")
        # Others are not JSON Schema's, and so say nothing of a value.
        return name if name in FORMATS else None

    def _required(self, names: Any, path: str) -> list[str]:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            _refuse(path, f"is {_shown(names)}, needed is an array of strings")
        return names


def _refuse(path: str, reason: str) -> NoReturn:
    raise GrammarError(f"the JSON schema{f' at {path[:200]}' if path else ''} {reason}")


def _check_number(value: Any, path: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > MAX_NUMBER:
        _refuse(path, f"has {_shown(value)}, where a number of at most {MAX_NUMBER} in size is needed")


def _is_control(char: str) -> bool:
    return (char < " " and char not in "\b\t\n\f\r") or char == "\x7f"


def _parts(value: Any) -> Iterator[Any]:
    """A value of JSON, and all values within it."""
    yield value
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _parts(item)


def _deeper_than(value: Any, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    return levels == 0 or any(
        _deeper_than(item, levels - 1) for item in (value.values() if isinstance(value, dict) else value)
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _name(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        bool: "a Boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return names[type(value)]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]}…"
