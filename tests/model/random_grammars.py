"""Random grammars, many of which force parts of their answers."""

import json
from typing import Any

from hypothesis import strategies as st

from persimmon.model.grammar import GrammarSpec

_TEXTS = st.text("abc é1", min_size=1, max_size=7)

_VALUES: list[dict[str, Any]] = [
    {"type": "boolean"},
    {"type": "null"},
    {"type": "integer", "minimum": 0, "maximum": 120},
    {"type": "string", "maxLength": 5},
    {"const": "persimmon"},
]


def _objects(values: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def of(properties: dict[str, Any], optional: int) -> dict[str, Any]:
        return {"type": "object", "properties": properties, "required": list(properties)[optional:]}

    return st.builds(of, st.dictionaries(_TEXTS, values, min_size=1, max_size=3), st.integers(0, 1))


def _arrays(values: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda items, least, more: {"type": "array", "items": items, "minItems": least, "maxItems": least + more},
        values,
        st.integers(0, 2),
        st.integers(0, 2),
    )


_SCHEMAS = st.recursive(
    st.one_of(
        st.sampled_from(_VALUES), st.lists(_TEXTS, min_size=1, max_size=3, unique=True).map(lambda own: {"enum": own})
    ),
    lambda values: st.one_of(_objects(values), _arrays(values)),
    max_leaves=4,
)

_REGEXES = st.recursive(
    _TEXTS,
    lambda parts: st.one_of(
        st.lists(parts, min_size=2, max_size=3).map("".join),
        st.lists(parts, min_size=2, max_size=3).map(lambda own: f"({'|'.join(own)})"),
        st.builds("({}){}".format, parts, st.sampled_from(["?", "{2}", "{1,3}"])),
    ),
    max_leaves=5,
)

grammars = st.builds(
    lambda kind_and_text, leading_space: GrammarSpec(*kind_and_text, leading_space=leading_space),
    st.one_of(
        st.tuples(st.just("json_schema"), _SCHEMAS.map(json.dumps)),
        st.tuples(st.just("regex"), _REGEXES),
        st.tuples(st.just("choice"), st.lists(_TEXTS, min_size=1, max_size=4).map(json.dumps)),
    ),
    st.booleans(),
)
"""Schemas of JSON, regular expressions and lists of choices, whose answers are short."""
