"""From what a request asks of its answers' form to the grammar they follow and the calls they may make.

Knows the requests' fields and how Persimmon calls tools; nothing of tokens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from persimmon.model.grammar import GrammarSpec
from persimmon.model.tool_calls import MAX_CALLS, CallForm, Function, calls_schema
from persimmon.server.http.schemas.chat import ChatCompletionRequest
from persimmon.server.http.schemas.constraint import Constraint
from persimmon.server.http.schemas.format_fields import schema_grammar
from persimmon.server.http.schemas.tool_fields import NamedTool


@dataclass(frozen=True)
class AnswerForm:
    """What an answer may look like.

    Attributes:
        constraint: the grammar that it follows to its end; None for any text.
        calls: the calls that it may make; None where it makes none.
    """

    constraint: Constraint | None = None
    calls: CallForm | None = None

    @property
    def may_be_text(self) -> bool:
        """Whether an answer may be any text, and ends where texts do."""
        return self.constraint is None or self.constraint.grammar.kind == "text_or_calls"

    @property
    def takes_stop_strings(self) -> bool:
        """Whether stop strings may end an answer: in free text, and in a regular expression or grammar, as in vLLM.

        They would break off JSON, choices and forced calls in the middle, so those ignore them.
        """
        return self.may_be_text or self._is_pattern

    @property
    def takes_stop_tokens(self) -> bool:
        """Whether stop tokens may end an answer.  The engine cannot tell free text from a strict call next to it."""
        return self.constraint is None or self._is_pattern

    @property
    def ends_by_grammar(self) -> bool:
        """Whether a grammar decides where an answer may end, so that ignore_eos and min_tokens are ignored."""
        return self.constraint is not None

    @property
    def _is_pattern(self) -> bool:
        return self.constraint is not None and self.constraint.grammar.kind in ("regex", "grammar")


ANY_TEXT = AnswerForm()


def chat_form(request: ChatCompletionRequest) -> AnswerForm:
    """The form of a chat's answers: text, JSON, or calls of tools."""
    functions = [tool.function.function for tool in request.callable_tools]
    if not functions:
        return AnswerForm(request.constraint)
    choice = request.tool_choice
    calls = CallForm(
        tuple(each.name for each in functions),
        parallel=request.parallel_tool_calls,
        forced=request.must_call,
        begun=choice.name if isinstance(choice, NamedTool) else None,
        enforced=request.must_call or any(tool.function.strict for tool in request.callable_tools),
    )
    parts = _parameters(request, functions)
    if isinstance(choice, NamedTool):
        return AnswerForm(parts[0], calls)
    content = None if request.must_call else request.format_constraint
    if not request.must_call and content is None:
        return AnswerForm(_text_or_calls(request, parts), calls)
    if content is not None:
        parts = (*parts, content)
    schema = calls_schema(functions, calls.parallel, None if content is None else _schema(content))
    return AnswerForm(Constraint("tools", schema_grammar(schema), parts), calls)


def _text_or_calls(request: ChatCompletionRequest, parameters: Sequence[Constraint]) -> Constraint | None:
    """What holds the model's own calls to the parameters of strict functions; without any, nothing does."""
    strict = tuple(own for tool, own in zip(request.callable_tools, parameters, strict=True) if tool.function.strict)
    if not strict:
        return None
    schemas = {
        tool.function.name: tool.function.function.arguments_schema if tool.function.strict else {"type": "object"}
        for tool in request.callable_tools
    }
    form = {"functions": schemas, "max_calls": MAX_CALLS if request.parallel_tool_calls else 1}
    return Constraint("tools", GrammarSpec("text_or_calls", json.dumps(form, ensure_ascii=False)), strict)


def _parameters(request: ChatCompletionRequest, functions: Sequence[Function]) -> tuple[Constraint, ...]:
    """What the arguments of each function must look like."""
    places = {tool.function.name: place for place, tool in enumerate(request.tools)}
    return tuple(
        Constraint(f"tools[{places[each.name]}].function.parameters", schema_grammar(each.arguments_schema))
        for each in functions
    )


def _schema(constraint: Constraint) -> Mapping[str, Any]:
    """The schema of a constraint that response_format has made."""
    if constraint.grammar.kind == "json_object":
        return {"type": "object"}
    schema: dict[str, Any] = json.loads(constraint.grammar.text)
    return schema
