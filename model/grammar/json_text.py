"""Strict JSON from a client: parsed within limits, or a sentence why not.  Also how values are named in messages."""

import json
from typing import Any, NoReturn

from persimmon.model.grammar_spec import GrammarError

MAX_DEPTH = 64
"""Levels of JSON in what a client sends.  The engine reads twice as many."""


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
        raise GrammarError(f"{what} contains a lone surrogate, which is not valid Unicode") from None
    except ValueError as error:
        raise GrammarError(f"{what} is not valid JSON: {error}") from None
    if deep:
        raise GrammarError(f"{what} is nested more than {MAX_DEPTH} levels deep")
    return value


def type_name(value: Any) -> str:
    """The JSON type of a value with its article, like "an array"."""
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


def shown(value: Any) -> str:
    """A value as JSON, cut to a hundred characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _deeper_than(value: Any, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    return levels == 0 or any(
        _deeper_than(item, levels - 1) for item in (value.values() if isinstance(value, dict) else value)
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")
