"""Where the references of a JSON Schema lead: `#/$defs/name`, `#anchor`, or the `$id` of a schema within it.

Follows JSON Schema 2020-12, section 8.2, and for drafts 6 and 7 an `$id` that is a fragment.  Nothing outside the
document is looked up.  Does not check that what a reference leads to is a schema.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote, urldefrag, urljoin

# Keywords whose values are schemas by name, and those whose values are data.
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_DATA = ("const", "enum", "default", "examples")


class Target(NamedTuple):
    """What a reference leads to.

    Attributes:
        schema: at that place.
        base: the URI that references within it are relative to.
    """

    schema: Any
    base: str


class References:
    """The schemas of one document that references may name.

    Args:
        root: the document.

    Attributes:
        base: the URI that the document's own references are relative to; empty without an `$id`.
    """

    def __init__(self, root: Any) -> None:
        self._resources: dict[str, Target] = {"": Target(root, "")}
        self._anchors: dict[tuple[str, str], Target] = {}
        self.base = base_within(root, "")
        for target in _schemas(root, ""):
            self._note(target)

    def _note(self, target: Target) -> None:
        schema, base = target
        identifier = schema.get("$id")
        if isinstance(identifier, str):
            if identifier.startswith("#"):
                self._anchors.setdefault((base, identifier[1:]), target)
            else:
                self._resources.setdefault(base, target)
        for keyword in ("$anchor", "$dynamicAnchor"):
            if isinstance(name := schema.get(keyword), str):
                self._anchors.setdefault((base, name), target)

    def find(self, reference: str, base: str) -> Target | None:
        """What a reference leads to; None if that is not in the document.

        Args:
            reference: the value of a `$ref`.
            base: the URI of the resource that it is in.
        """
        if reference.startswith("#"):
            resource, fragment = base, reference[1:]
        else:
            try:
                resource, fragment = urldefrag(urljoin(base, reference))
            except ValueError:
                return None
        target = self._resources.get(resource)
        if target is None or not fragment:
            return target
        if not fragment.startswith("/"):
            return self._anchors.get((target.base, unquote(fragment)))
        return _follow(target, fragment)


def base_within(schema: Any, base: str) -> str:
    """The URI that references within a schema are relative to, which its `$id` may change.

    Args:
        schema: any value.
        base: the URI around it.
    """
    identifier = schema.get("$id") if isinstance(schema, Mapping) else None
    if not isinstance(identifier, str) or identifier.startswith("#"):
        return base
    try:
        return urldefrag(urljoin(base, identifier))[0]
    except ValueError:
        return base


def _follow(target: Target, pointer: str) -> Target | None:
    value, base = target
    for part in pointer.split("/")[1:]:
        key = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
        base = base_within(value, base)
    return Target(value, base)


def _schemas(value: Any, base: str) -> Iterator[Target]:
    """All objects of a document where a schema may stand."""
    if isinstance(value, list):
        for item in value:
            yield from _schemas(item, base)
    elif isinstance(value, dict):
        base = base_within(value, base)
        yield Target(value, base)
        for key, item in value.items():
            if key in _NAMED_SCHEMAS and isinstance(item, dict):
                for schema in item.values():
                    yield from _schemas(schema, base)
            elif key not in _DATA:
                yield from _schemas(item, base)
