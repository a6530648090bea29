"""A checkpoint's own chat template: Jinja2 as Transformers renders it, in Jinja2's sandbox.

Knows what templates may call. Knows nothing about files and tokens, and only that messages are JSON.
"""

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from persimmon.model.chat_template_files import DEFAULT, TOOL_USE, ChatTemplateError, TemplateSources
from persimmon.model.errors import CheckpointError

MAX_PROMPT_CHARACTERS = 2**25
"""Limit of a rendered conversation: far more than a context holds, but small enough for memory."""

MAX_SECONDS = 20.0
"""Time limit for rendering one conversation, checked whenever the template writes something."""


_OF_A_CONVERSATION = ("messages", "tools", "documents", "add_generation_prompt")


class _RaisedError(TemplateError):
    """An error that a template raises itself."""


class ChatTemplate:
    """The templates of a checkpoint, compiled.  Safe to use from several threads at once.

    Args:
        sources: the checkpoint's.
        variables: what each template sees besides the conversation: the named special tokens, like "bos_token".

    Attributes:
        reserved: names of variables and functions that a template sees in any case.

    Raises:
        CheckpointError: a template is not valid Jinja2.
    """

    def __init__(self, sources: TemplateSources, variables: Mapping[str, str]) -> None:
        environment = _environment()
        place = sources.place
        self._templates = {}
        for name, source in sources.texts.items():
            try:
                self._templates[name] = environment.from_string(source)
            except TemplateSyntaxError as error:
                raise CheckpointError(
                    f"{place}: its chat template is not valid Jinja2: line {error.lineno}: {error.message}"
                ) from None
            except (RecursionError, MemoryError, ValueError, OverflowError) as error:
                raise CheckpointError(f"{place}: its chat template cannot be compiled: {error}") from None
        self._variables = dict(variables)
        self.reserved = frozenset({*_OF_A_CONVERSATION, *variables, *environment.globals})
        self._text = "".join(sources.texts.values())

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: in the form of OpenAI's API.
            tools: that may be called, in the form of OpenAI's API; None where there are none.
            add_generation_prompt: end with the beginning of an answer.
            options: further variables; those of reserved names are not used.

        Raises:
            ChatTemplateError: the template refuses the conversation, fails, or writes too much or for too long.
        """
        template = self._templates[TOOL_USE if tools and TOOL_USE in self._templates else DEFAULT]
        variables = {
            **{name: value for name, value in (options or {}).items() if name not in self.reserved},
            **self._variables,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        deadline = time.monotonic() + MAX_SECONDS
        try:
            return _bounded(template.generate(variables), deadline)
        except _RaisedError as error:
            raise ChatTemplateError(str(error.message)[:1000]) from None
        except ChatTemplateError:
            raise
        except Exception as error:  # noqa: BLE001 - a template may do wrong in as many ways as a program
            reason = " ".join(str(error).split())[:300]
            raise ChatTemplateError(f"it fails with {type(error).__name__}: {reason}") from None

    def names_role(self, role: str) -> bool:
        """Whether a template contains a role's name in quotes.

        A name with other characters than letters is part of the format.
        """
        return role.isidentifier() and (f"'{role}'" in self._text or f'"{role}"' in self._text)


def _bounded(pieces: Iterable[str], deadline: float) -> str:
    """The pieces joined to one text, within the limits on its length and time."""
    written, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_PROMPT_CHARACTERS:
            raise ChatTemplateError(f"it writes more than {MAX_PROMPT_CHARACTERS} characters")
        if time.monotonic() > deadline:
            raise ChatTemplateError(f"it takes more than {MAX_SECONDS:g} s")
        written.append(piece)
    return "".join(written)


class _GenerationBlock(Extension):
    """{% generation %}, with which templates mark answers for training.  It changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, LoopControlExtension]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja2's own filter escapes characters that are special in HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise _RaisedError(re.sub(r"\s+", " ", str(message)))


def _now(layout: str) -> str:
    return datetime.now().strftime(layout)
