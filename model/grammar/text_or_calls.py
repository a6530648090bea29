"""Answers that are free text, or calls of functions with arguments that fit -> a Lark grammar, and a schema for each.

Knows how `model.tool_calls` writes calls.  What begins one is a call: it is taken out of the free texts.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from model.grammar.json_schema import read_json, read_schema
from model.grammar.spec import GrammarError

_WHITE_SPACE = r"[ \t\r\n]*"


def read_text_or_calls(text: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """A grammar, and by the names that it has for them the schemas of arguments.

    Args:
        text: {"functions": {name: JSON Schema of its arguments}, "parallel": whether there may be several calls}.

    Raises:
        GrammarError: it is none, or a schema cannot be used.
    """
    form = read_json(text, "the description of functions")
    functions = form.get("functions") if isinstance(form, dict) else None
    if not isinstance(functions, dict) or not functions or not isinstance(form.get("parallel"), bool):
        raise GrammarError('the description of functions must be like {"functions": {name: schema}, "parallel": true}')
    if not all(re.fullmatch(r"[\w-]+", name, re.ASCII) for name in functions):
        raise GrammarError("the description of functions has names of other signs than letters, digits, _ and -")
    schemas = {f"arguments{index}": read_schema(json.dumps(each)) for index, each in enumerate(functions.values())}
    return _lark(list(functions), form["parallel"]), schemas


def _lark(names: Sequence[str], parallel: bool) -> str:
    lines = [
        "start: TEXT | first more",
        'more: "]" | following more' if parallel else 'more: "]"',
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
