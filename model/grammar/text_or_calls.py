"""Answers that are free text, or calls of functions with arguments that fit -> a Lark grammar, and a schema for each.

Knows how `persimmon.model.tool_calls` writes calls.  What begins one is a call: it is taken out of the free texts.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from persimmon.model.grammar.json_schema import read_schema
from persimmon.model.grammar.json_text import read_json
from persimmon.model.grammar_spec import GrammarError

MAX_TOTAL_BYTES = 262_144
"""Of the schemas of all functions, without descriptions and with formats written out."""

_WHITE_SPACE = r"[ \t\r\n]*"


def read_text_or_calls(text: str, additional_properties: bool) -> tuple[str, dict[str, dict[str, Any]]]:
    """A grammar, and by the names that it has for them the schemas of arguments.

    Args:
        text: {"functions": {name: JSON Schema of its arguments}, "max_calls": how many calls there may be}.
        additional_properties: as `read_schema` has it.

    Raises:
        GrammarError: it is none, or a schema cannot be used.
    """
    form = read_json(text, "the description of functions")
    functions = form.get("functions") if isinstance(form, dict) else None
    most = form.get("max_calls") if isinstance(form, dict) else None
    if not isinstance(functions, dict) or not functions or type(most) is not int or not 1 <= most <= 1000:
        raise GrammarError('the description of functions must be like {"functions": {name: schema}, "max_calls": 9}')
    if not all(re.fullmatch(r"[\w-]+", name, re.ASCII) for name in functions):
        raise GrammarError(
            "the description of functions has a name with characters other than letters, digits, _ and -"
        )
    schemas = {
        f"arguments{index}": read_schema(json.dumps(each), additional_properties)
        for index, each in enumerate(functions.values())
    }
    size = sum(len(json.dumps(schema)) for schema in schemas.values())
    if size > MAX_TOTAL_BYTES:
        raise GrammarError(f"the parameters of all functions have {size} bytes; at most {MAX_TOTAL_BYTES} are allowed")
    return _lark(list(functions), most), schemas


def _lark(names: Sequence[str], max_calls: int) -> str:
    lines = [
        f'start: TEXT | first following{{0,{max_calls - 1}}} "]"' if max_calls > 1 else 'start: TEXT | first "]"',
        f"first: {_alternatives('FIRST', len(names))}",
        f"following: {_alternatives('NEXT', len(names))}",
    ]
    for index, name in enumerate(names):
        call = rf'\{{"name": ?"{name}", ?"arguments": ?'
        lines += [rf"FIRST{index}: /\[{call}/", f"NEXT{index}: /, ?{call}/"]
    signs = (r"\[", r"\{", '"name"', ":", f'"({"|".join(names)})"', ",", '"arguments"', ":", r"\{")
    begun = _WHITE_SPACE + _WHITE_SPACE.join(signs)
    return "\n".join([*lines, f"TEXT: /(?s:.*)/ & ~(/(?s:{begun}.*)/)"])


def _alternatives(beginning: str, count: int) -> str:
    return " | ".join(f'{beginning}{index} @arguments{index} "}}"' for index in range(count))
