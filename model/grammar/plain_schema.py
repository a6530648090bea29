"""Keywords that the grammar engine lacks -> the same in keywords that it has, where that is possible.

Many schemas have such keywords with values that say nothing (`propertyNames: {"type": "string"}`), or that say what
another keyword also says (`unevaluatedProperties` without `allOf` and the like).  Looks at one schema at a time.
"""

from collections.abc import Callable, Mapping
from typing import Any

from persimmon.model.grammar.formats import FORMATS

Schema = Mapping[str, Any]
Follow = Callable[[str], Any]
"""What a reference leads to; None if that is not in the document."""

IN_PLACE = ("allOf", "anyOf", "oneOf", "$ref", "if", "then", "else", "dependentSchemas", "not")
"""Keywords whose schemas apply to the same value."""

_OF_OBJECTS = ("dependencies", "dependentRequired", "dependentSchemas", "propertyNames", "unevaluatedProperties")
_OF_ARRAYS = ("contains", "minContains", "maxContains", "uniqueItems", "unevaluatedItems")
_OF_STRINGS = ("type", "const", "enum", "pattern", "format", "minLength", "maxLength", "$ref", "anyOf", "oneOf")
_INTEGER_FORMATS = {
    f"{sign}int{bits}": (0 if sign else -(2 ** (bits - 1)), 2 ** (bits if sign else bits - 1) - 1)
    for sign in ("", "u")
    for bits in (8, 16, 32, 64)
}
_MAX_REFERENCES = 64
_MAX_NAME_LENGTH = 1_000


def plain_schema(schema: Schema, follow: Follow) -> dict[str, Any] | bool:
    """A schema that allows the same values, without the keywords of which others can take the place.

    Args:
        schema: a client's; only its own keywords are changed, and malformed ones are left as they are.
        follow: what a reference in it leads to.
    """
    plain = dict(schema)
    types = _types(schema)
    for key in (*(_OF_OBJECTS if "object" not in types else ()), *(_OF_ARRAYS if "array" not in types else ())):
        plain.pop(key, None)
    if "not" in plain and says_nothing(plain["not"]):
        return False
    if plain.get("not") is False:
        del plain["not"]
    _plain_conditions(plain)
    _plain_numbers(plain, types)
    _plain_items(plain)
    _plain_names(plain, follow)
    _plain_properties(plain)
    _with_discriminator(plain)
    return plain


def says_nothing(schema: Any) -> bool:
    """Whether every value fits a schema because it has no keyword."""
    return schema is True or schema == {}


def _types(schema: Schema) -> set[str]:
    types = schema.get("type", ["object", "array", "number", "string"])
    return {name for name in (types if isinstance(types, list) else [types]) if isinstance(name, str)}


def _plain_conditions(plain: dict[str, Any]) -> None:
    """Takes off conditions that have no effect."""
    if "if" not in plain or all(says_nothing(plain.get(key, True)) for key in ("then", "else")):
        for key in ("if", "then", "else"):
            plain.pop(key, None)
    for key in ("dependencies", "dependentRequired", "dependentSchemas"):
        needs = plain.get(key)
        if isinstance(needs, dict) and all(need == [] or says_nothing(need) for need in needs.values()):
            del plain[key]


def _plain_numbers(plain: dict[str, Any], types: set[str]) -> None:
    """Bounds as all drafts but the fourth write them, and those of the integer formats that OpenAPI has."""
    for bound in ("minimum", "maximum"):
        exclusive = f"exclusive{bound.capitalize()}"
        if isinstance(plain.get(exclusive), bool) and plain.pop(exclusive) and bound in plain:
            plain[exclusive] = plain.pop(bound)
    name = plain.get("format")
    if isinstance(name, str) and name in _INTEGER_FORMATS and types & {"integer", "number"}:
        low, high = _INTEGER_FORMATS[name]
        if _is_number(plain.get("minimum", low)) and _is_number(plain.get("maximum", high)):
            plain["minimum"] = max(plain.get("minimum", low), low)
            plain["maximum"] = min(plain.get("maximum", high), high)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain_items(plain: dict[str, Any]) -> None:
    """Takes the place of what speaks of all items together."""
    if "contains" not in plain or (plain.get("minContains") == 0 and "maxContains" not in plain):
        for key in ("contains", "minContains", "maxContains"):
            plain.pop(key, None)
    elif says_nothing(plain["contains"]):
        least, most = plain.get("minContains", 1), plain.get("maxContains", plain.get("maxItems", 0))
        if all(map(_is_number, (least, most, plain.get("minItems", 0), plain.get("maxItems", 0)))):
            plain["minItems"] = max(plain.get("minItems", 0), least)
            if "maxContains" in plain:
                plain["maxItems"] = min(plain.get("maxItems", most), most)
            for key in ("contains", "minContains", "maxContains"):
                plain.pop(key, None)
    if plain.get("uniqueItems") is False or _at_most_one_item(plain):
        plain.pop("uniqueItems", None)
    rest = plain.get("unevaluatedItems")
    if rest is None or "contains" in plain:
        return
    listed = isinstance(plain.get("items"), list)
    own = "additionalItems" if listed else "items"
    if own in plain or says_nothing(rest):
        del plain["unevaluatedItems"]
    elif not plain.keys() & set(IN_PLACE):
        plain[own] = plain.pop("unevaluatedItems")


def _at_most_one_item(plain: Schema) -> bool:
    limits: list[Any] = [plain.get("maxItems")]
    first = plain.get("prefixItems", [])
    if plain.get("items") is False and isinstance(first, list):
        limits.append(len(first))
    return any(_is_number(limit) and limit <= 1 for limit in limits)


def _plain_properties(plain: dict[str, Any]) -> None:
    """Takes the place of unevaluatedProperties where additionalProperties means the same."""
    rest = plain.get("unevaluatedProperties")
    if rest is None:
        return
    if "additionalProperties" in plain:
        del plain["unevaluatedProperties"]
    elif not plain.keys() & set(IN_PLACE):
        plain["additionalProperties"] = plain.pop("unevaluatedProperties")


def _with_discriminator(plain: dict[str, Any]) -> None:
    """Requires the property that distinguishes alternatives, as OpenAPI does; Pydantic needs it to read an answer.

    Pydantic does not list it as required where it has a default.
    """
    discriminator = plain.get("discriminator")
    name = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
    required = plain.get("required", [])
    if isinstance(name, str) and plain.keys() & {"oneOf", "anyOf"} and isinstance(required, list):
        plain["required"] = required if name in required else [*required, name]


def _plain_names(plain: dict[str, Any], follow: Follow) -> None:
    """Takes the place of propertyNames: by properties where the names are listed, by a pattern where they have one."""
    if "propertyNames" not in plain:
        return
    names = _names(plain["propertyNames"], follow, 0)
    rest = plain.get("additionalProperties", plain.get("unevaluatedProperties", True))
    properties, has_patterns = plain.get("properties", {}), bool(plain.get("patternProperties"))
    unevaluated = "unevaluatedProperties" in plain and plain.keys() & set(IN_PLACE)
    if names is None or not isinstance(properties, dict) or (names != "" and (has_patterns or unevaluated)):
        return
    if isinstance(names, list):
        plain["properties"] = {
            **{name: schema if name in names else False for name, schema in properties.items()},
            **{name: rest for name in names if name not in properties},
        }
    elif names:
        if properties:
            return  # patternProperties would hold for the listed ones too
        plain["patternProperties"] = {names: rest}
    plain.pop("propertyNames")
    if names != "":
        plain["additionalProperties"] = False
        plain.pop("unevaluatedProperties", None)


def _names(schema: Any, follow: Follow, level: int) -> list[str] | str | None:
    """What property names may be: one of a list, whatever matches a pattern ("" for any); None if neither says it."""
    if isinstance(schema, bool):
        return "" if schema else []
    if not isinstance(schema, dict) or level > _MAX_REFERENCES:
        return None
    keys = {key for key in _OF_STRINGS if key in schema}
    if schema.keys() & {"not", "if", "allOf", "$dynamicRef"}:
        return None
    if "type" in keys:
        if "string" not in _types(schema):
            return []
        keys.remove("type")
    if "format" in keys and schema["format"] not in FORMATS:
        keys.remove("format")
    if not keys:
        return ""
    if len(keys - {"minLength", "maxLength"}) > 1:
        return None
    if keys <= {"minLength", "maxLength"}:
        return _lengths_pattern(schema.get("minLength", 0), schema.get("maxLength"))
    if len(keys) > 1:
        return None
    [key] = keys
    value = schema[key]
    match key:
        case "const":
            return [value] if isinstance(value, str) else []
        case "enum":
            return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else None
        case "pattern":
            return value if isinstance(value, str) else None
        case "format":
            return FORMATS[value]
        case "$ref":
            return _names(follow(value), follow, level + 1) if isinstance(value, str) else None
        case _:
            parts = [_names(part, follow, level + 1) for part in value] if isinstance(value, list) else [None]
            listed = [part for part in parts if isinstance(part, list)]
            return list(dict.fromkeys(name for part in listed for name in part)) if len(listed) == len(parts) else None


def _lengths_pattern(least: Any, most: Any) -> str | None:
    if not all(_is_number(count) and 0 <= count <= _MAX_NAME_LENGTH for count in (least, most or 0)):
        return None
    return rf"^[\s\S]{{{int(least)},{'' if most is None else int(most)}}}$"
