"""What a client asks an answer to look like, as plain data, and the error for what cannot be asked."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "grammar", "text_or_calls"]

KINDS: tuple[GrammarKind, ...] = get_args(GrammarKind)


class GrammarError(ValueError):
    """A grammar that cannot be used, or that an answer cannot follow any further.

    The message is one sentence for the client: what was given, what is allowed.
    """


@dataclass(frozen=True)
class GrammarSpec:
    """A grammar, as it crosses from an API worker to the engine process too.

    Attributes:
        kind: the language of `text`:
            json_object: any JSON object; `text` says nothing.
            json_schema: JSON that is valid under this JSON Schema, itself written as JSON.
            regex: the whole answer matches this regular expression, in the syntax of Rust's regex crate: without
                look-around and back-references.  Its Perl classes, like that for digits, match only ASCII.
            choice: one of the strings of this JSON array.
            grammar: a context-free grammar, in EBNF as llama.cpp writes it (GBNF, `root ::= …`) or in Lark's form
                (`start: …`).
            text_or_calls: any text, or calls of functions as `persimmon.model.tool_calls` writes them, with arguments
                that are valid: {"functions": {name: JSON Schema}, "max_calls": how many there may be}.
        text: in that language.
        additional_properties: whether an object whose JSON Schema lists properties, and does not say whether there may
            be others, may have others.
        leading_space: whether the answer begins with a space that belongs to what stands before it, as in
            `adept: {"a": 1}`.  It is then required, because an answer's own first space could not be distinguished from
                it.
    """

    kind: GrammarKind
    text: str = ""
    _: KW_ONLY
    additional_properties: bool = False
    leading_space: bool = False
