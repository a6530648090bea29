"""A client's context-free grammar, in EBNF or in Lark's form -> a Lark grammar that the engine compiles within bounds.

Knows how the two are written, not what they mean: the engine's own parser decides whether a grammar is right.  What is
refused here by its looks is what the engine would pay too much for, and what reaches past the text of an answer: tokens
by their numbers, options of the engine, other grammars.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from llguidance import grammar_from

from persimmon.model.grammar_spec import GrammarError

MAX_BYTES = 16_384
"""Of a grammar."""

MAX_RULES = 200
MAX_GROUPS = 200
"""Of a grammar.  The engine goes into a rule where it is first used, and takes 3 KiB of its stack for each, and for
each bracket."""

MAX_TERMINAL_BYTES = 2_048
"""Of a terminal with all terminals that it uses written out.  A step of one costs the square of its length."""

_EBNF = re.compile(r"^\s*[A-Za-z][\w-]*\s*::=", re.MULTILINE)

_TOKEN = re.compile(
    r"""(?P<blank>[ \t\r\n]+|(?:\#|//)[^\n]*)
    |(?P<literal>"(?:\\.|[^"\\])*"i?|/(?:\\.|[^/\\])+/[imslux]*)
    |(?P<terminal>_?[A-Z][_A-Z0-9-]*)
    |(?P<rule>[!?_]*[a-z][_a-z0-9-]*)
    |(?P<keyword>%[a-z]+(?:[ \t]*\{\s*\})?)
    |(?P<sign>.)""",
    re.VERBOSE | re.DOTALL,
)
_KEYWORDS = re.compile(r"%(?:import|ignore|llguidance[ \t]*\{\s*\})")
_FORBIDDEN = {
    "<": "tokens by name or number (<…>)",
    "@": "other grammars (@…)",
    "&": "intersections (&)",
    "::": "parameters of rules (::)",
    "]:": "options of rules ([…] before the colon)",
}


class _Token(NamedTuple):
    kind: str
    text: str


def read_grammar(text: str) -> str:
    """A grammar in Lark's form whose text is the client's, or the client's EBNF rewritten.

    Args:
        text: `root ::= …` or `start: …`.

    Raises:
        GrammarError: it is too large, or has what is not supported.
    """
    if not text.strip():
        raise GrammarError("the grammar is empty; expected a rule named root (in EBNF) or start (in Lark's form)")
    if len(text.encode()) > MAX_BYTES:
        raise GrammarError(f"the grammar has {len(text.encode())} bytes; at most {MAX_BYTES} are allowed")
    if _EBNF.search(text):
        _check_rules(text.count("::="))
        try:
            text = grammar_from("gbnf", text)
        except ValueError as error:
            detail = str(error).removeprefix("Failed to convert the grammar from GBNF to Lark: ")
            raise GrammarError(f"the grammar is not valid EBNF: {detail}") from None
    tokens = list(_tokens(text))
    _check_signs(tokens)
    bodies = _bodies(tokens)
    _check_rules(len(bodies))
    _check_terminals(bodies)
    return text


def _tokens(text: str) -> Iterator[_Token]:
    for match in _TOKEN.finditer(text):
        if match.lastgroup is not None and match.lastgroup != "blank":
            yield _Token(match.lastgroup, match.group())


def _check_rules(count: int) -> None:
    if count > MAX_RULES:
        raise GrammarError(f"the grammar has {count} rules; at most {MAX_RULES} are allowed")


def _check_signs(tokens: Sequence[_Token]) -> None:
    if sum(token.text in ("(", "[") for token in tokens) > MAX_GROUPS:
        raise GrammarError(f"the grammar has more than {MAX_GROUPS} groups in brackets; at most that number is allowed")
    for token, following in zip(tokens, [*tokens[1:], _Token("", "")], strict=True):
        if token.kind == "keyword" and not _KEYWORDS.fullmatch(token.text):
            raise GrammarError(f"the grammar has {token.text}; only %import common.… and %ignore are supported")
        sign = token.text + following.text
        for forbidden in (token.text, sign[:2] if token.kind == following.kind == "sign" else ""):
            if token.kind == "sign" and forbidden in _FORBIDDEN:
                raise GrammarError(f"the grammar has {_FORBIDDEN[forbidden]}, which is not supported")
        # A repetition is the other thing that this sign stands for.
        if token.text == "~" and not following.text.isdecimal():
            raise GrammarError("the grammar has a negation (~), which is not supported")


def _bodies(tokens: Sequence[_Token]) -> dict[str, list[_Token]]:
    """What each rule and terminal is made of, and the %ignore directives."""
    bodies: dict[str, list[_Token]] = {}
    body: list[_Token] = []
    for index, token in enumerate(tokens):
        defines = token.kind in ("rule", "terminal") and tokens[index + 1 : index + 2] == [_Token("sign", ":")]
        if defines or token.kind == "keyword":
            body = bodies.setdefault(token.text, [])
        else:
            body.append(token)
    return bodies


def _check_terminals(bodies: dict[str, list[_Token]]) -> None:
    lengths: dict[str, int] = {}

    def length(name: str) -> int:
        if name not in lengths:
            lengths[name] = 0  # a terminal within itself is refused by the engine
            lengths[name] = sum(
                length(token.text) if token.kind == "terminal" else len(token.text.encode())
                for token in bodies.get(name, ())
            )
            if lengths[name] > MAX_TERMINAL_BYTES:
                raise GrammarError(
                    f"the grammar's terminal {name} is too long after the terminals that it uses are substituted; at "
                    f"most {MAX_TERMINAL_BYTES} bytes are allowed"
                )
        return lengths[name]

    for name, body in bodies.items():
        if name.startswith("%") or name.lstrip("_").isupper():
            length(name)
        for token in body:
            if token.kind == "literal" and len(token.text.encode()) > MAX_TERMINAL_BYTES:
                raise GrammarError(
                    f"the grammar has a string or a regular expression of more than {MAX_TERMINAL_BYTES} bytes"
                )
