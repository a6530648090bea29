"""Functions that a model may call: how they are described to it and called, and how calls are found in an answer.

Persimmon was trained without tools, so the form is this server's own: an answer that is a list of calls, in JSON.  It
is written down here once, for what the model reads and for what it writes.  Knows nothing of tokens, HTTP or grammars.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_CALLS = 16
"""In an answer whose form is enforced.  A model that repeats itself would otherwise call until its context is full."""

_DESCRIPTION = """\
You can call these functions, each described in JSON:

{functions}

To call functions, answer with a list of calls and nothing else, like this:

[{{"name": "function", "arguments": {{"parameter": "value"}}}}]"""


@dataclass(frozen=True)
class Function:
    """A function that a model may call.

    Attributes:
        name: letters, digits, "_" and "-".
        description: what it is good for, if anybody says so.
        parameters: a JSON Schema of an object; None for a function without parameters.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None

    @property
    def arguments_schema(self) -> dict[str, Any]:
        """The JSON Schema of its arguments, which are always an object."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {**self.parameters, "type": "object"}


@dataclass(frozen=True)
class ToolCall:
    """A call as it stands in a conversation.

    Attributes:
        name: the function's.
        arguments: a JSON object, unchanged from the call.
    """

    name: str
    arguments: str


def describe(functions: Iterable[Function]) -> str:
    """The description of the functions for the model, to be put where a system message is."""
    lines = (
        json.dumps(
            {"name": each.name}
            | ({} if each.description is None else {"description": each.description})
            | {"parameters": each.arguments_schema},
            ensure_ascii=False,
        )
        for each in functions
    )
    return _DESCRIPTION.format(functions="\n".join(lines))


def calls_text(calls: Iterable[ToolCall]) -> str:
    """Calls as the model writes them: one JSON list, the arguments as they are."""
    written = (f'{{"name": {json.dumps(call.name)}, "arguments": {call.arguments or "{}"}}}' for call in calls)
    return f"[{', '.join(written)}]"


def begun_call(name: str) -> str:
    """The beginning of an answer that calls a function; a space and the arguments come next."""
    return f' [{{"name": {json.dumps(name)}, "arguments":'


def result_text(name: str, result: str) -> str:
    """What a call has given, as the model reads it in the turn after its own."""
    return f"Result of {name}: {result}"


def calls_schema(functions: Sequence[Function], parallel: bool, otherwise: Mapping[str, Any] | None = None) -> Any:
    """The JSON Schema of an answer that is a list of calls.

    Args:
        functions: that may be called, at least one, all of different names.
        parallel: whether there may be several calls.
        otherwise: the JSON Schema of what may be said instead of calls.
    """
    calls: dict[str, Any] = {
        "type": "array",
        "items": {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {
                        "name": {"const": each.name},
                        "arguments": {"$ref": f"#/$defs/arguments-{each.name}"},
                    },
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
                for each in functions
            ]
        },
        "minItems": 1,
        "maxItems": MAX_CALLS if parallel else 1,
    }
    parts = _Parts()
    definitions = {f"arguments-{each.name}": parts.add(each.arguments_schema) for each in functions}
    if otherwise is None:
        return {**calls, "$defs": definitions}
    definitions["otherwise"] = parts.add(otherwise)
    return {"anyOf": [calls, {"$ref": "#/$defs/otherwise"}], "$defs": definitions}


class _Parts:
    """Schemas that become parts of one: each keeps an `$id` of its own, so that its references lead where they did."""

    def __init__(self) -> None:
        self._identifiers: set[str] = set()

    def add(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """A schema with an `$id`, a new one where it has none or another schema has the same."""
        own = schema.get("$id")
        if not isinstance(own, str) or own.startswith("#") or own in self._identifiers:
            own = f"https://part-{len(self._identifiers)}.invalid/"
        self._identifiers.add(own)
        return {**schema, "$id": own}


@dataclass(frozen=True)
class CallForm:
    """Which calls an answer may make.

    Attributes:
        names: of the functions, different ones.
        parallel: whether there may be several calls.
        forced: whether there is nothing but calls.
        begun: the function whose call the prompt has begun, with `begun_call`: the answer is its arguments.
        enforced: whether a grammar holds calls to their form, so that stop strings do not cut them.
    """

    names: tuple[str, ...]
    parallel: bool = True
    forced: bool = False
    begun: str | None = None
    enforced: bool = False


@dataclass(frozen=True)
class CallDelta:
    """What a piece of an answer adds to one of its calls.

    Attributes:
        index: of the call in the answer.
        arguments: the next piece of them; perhaps empty.
        name: the function's, with the first piece.
    """

    index: int
    arguments: str
    name: str | None = None


class CallReader:
    """Finds the calls in one answer that comes in pieces, and separates them from its content.

    Calls are what `calls_text` writes, from the answer's first character on; white space between JSON's signs does not
    matter.  A text that may still become a call is held back, and is content as soon as it cannot.  It is a call from
    its arguments' first character on: whether they keep to JSON, and to the function's parameters, is up to their
    writer, a grammar or the model.  Where the list ends the answer ends.

    Args:
        form: which calls the answer may make.

    Attributes:
        has_whole_calls: whether there are calls, and the arguments of the last one are complete.
        ended: whether the calls have ended; nothing that comes later is part of the answer.
    """

    def __init__(self, form: CallForm) -> None:
        self.has_whole_calls = False
        self.ended = False
        self._form = form
        self._calls = 0
        self._held = ""
        first = {f"[{_begin(name)}": name for name in form.names} if form.begun is None else {"{": form.begun}
        self._awaited = _Awaited(first)
        self._arguments = _JsonEnd()
        self._read = self._read_signs
        self._content = ""
        self._deltas: list[CallDelta] = []

    def push(self, text: str) -> tuple[str, list[CallDelta]]:
        """Takes the next piece of the answer.

        Returns:
            What is certain to be content, and what is added to calls.
        """
        self._content, self._deltas = "", []
        while text and not self.ended:
            text = self._read(text)
        return self._content, self._deltas

    def finish(self) -> str:
        """The answer has ended: what was held back, and is content after all."""
        held, self._held = self._held, ""
        return "" if self._form.forced else held

    def _read_signs(self, text: str) -> str:
        """What stands before, between and after the arguments; returns the rest of the text."""
        for place, character in enumerate(text):
            self._held += character
            if not self._awaited.step(character):
                return self._no_call(text[place + 1 :])
            if self._awaited.complete:
                self._held = ""
                if self._awaited.value is None:
                    self.ended = True
                    return ""
                self._begin_call(self._awaited.value)
                return text[place:]
        return ""

    def _no_call(self, rest: str) -> str:
        # Text after a call is not content: the client has already received calls.
        if self._calls:
            self.ended = True
        else:
            self._content += self._held
            self._read = self._read_content
        self._held = ""
        return rest

    def _begin_call(self, name: str) -> None:
        self._deltas.append(CallDelta(self._calls, "", name))
        self._calls += 1
        self._arguments = _JsonEnd()
        self._read = self._read_arguments
        self.has_whole_calls = False

    def _read_arguments(self, text: str) -> str:
        end = self._arguments.find(text)
        self._deltas.append(CallDelta(self._calls - 1, text[:end]))
        if end is None:
            return ""
        self.has_whole_calls = True
        self.ended = self._form.begun is not None
        following = {f"}},{_begin(name)}": name for name in self._form.names} if self._form.parallel else {}
        self._awaited = _Awaited({"}]": None, **following})
        self._read = self._read_signs
        return text[end:]

    def _read_content(self, text: str) -> str:
        self._content += text
        return ""


def _begin(name: str) -> str:
    """A call up to the first character of its arguments, without white space."""
    return f'{{"name":"{name}","arguments":{{'


class _Awaited:
    """Follows a text along the few that it may be, where white space outside strings does not matter.

    Args:
        values: what each of them stands for; none begins another.

    Attributes:
        complete: whether one of them has come; `value` is what it stands for.
    """

    def __init__(self, values: Mapping[str, str | None]) -> None:
        self.complete = False
        self.value: str | None = None
        self._values = values
        self._possible = list(values)
        self._length = 0
        self._in_string = False

    def step(self, character: str) -> bool:
        """Takes one more character; whether the text may still become one of them."""
        if character in " \t\r\n" and not self._in_string:
            return True
        self._possible = [text for text in self._possible if text[self._length] == character]
        self._length += 1
        self._in_string ^= character == '"'
        self.complete = bool(self._possible) and len(self._possible[0]) == self._length
        if self.complete:
            self.value = self._values[self._possible[0]]
        return bool(self._possible)


@dataclass
class _JsonEnd:
    """Finds where a JSON object or array ends, in pieces of text from its first character on."""

    _depth: int = field(default=0, init=False)
    _in_string: bool = field(default=False, init=False)
    _escaped: bool = field(default=False, init=False)

    def find(self, text: str) -> int | None:
        """How much of the next piece belongs to it; None for all, if the end is not there yet."""
        for place, character in enumerate(text, 1):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place
        return None
