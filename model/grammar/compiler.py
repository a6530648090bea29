"""A grammar and a vocabulary -> a `Matcher`: what a client sent is checked, and compiled within limits.

Masks hold every token whose text may come next, however a tokenizer would split that text: which of them comes is left
to the model.  Knows nothing of requests or of sampling.
"""

import json
import re
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any, assert_never

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark

from persimmon.model.grammar.context_free import read_grammar
from persimmon.model.grammar.forced_text import ForcedText
from persimmon.model.grammar.json_schema import read_schema
from persimmon.model.grammar.json_text import read_json
from persimmon.model.grammar.matcher import Matcher, Vocabulary, pack_bits, reason
from persimmon.model.grammar.text_or_calls import read_text_or_calls
from persimmon.model.grammar_spec import KINDS, GrammarError, GrammarSpec
from persimmon.model.tokenizer import Tokenizer

MAX_SPEC_BYTES = 65_536
"""Of a grammar's text, except a JSON Schema's."""

MAX_SCHEMA_TEXT_BYTES = 2**20
"""Of a JSON Schema with its descriptions, which `json_schema` leaves out before it looks at the size that counts."""

MAX_REGEX_BYTES = 1_024
"""Of a regular expression.  A step of one costs the square of its length."""

MAX_CHOICES = 4_096


def _limits(items_in_row: int) -> LLParserLimits:
    return LLParserLimits(
        initial_lexer_fuel=400_000,
        max_grammar_size=50_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_items_in_row=items_in_row,
        max_lexer_states=50_000,
        # So a vocabulary changes nothing about what compiles, and compiling walks through none.
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


LIMITS = _limits(5_000)
"""What the engine may spend: on compiling, on one token, and on the states of one answer.

With those on what is read, they hold the worst grammars we could think of to a second and 200 MB; they are in
tests/model/test_grammar_limits.py.  A unit of fuel is about 100 nanoseconds, a state half a kilobyte.
"""

AMBIGUOUS_LIMITS = _limits(1_000)
"""The same where a grammar may be ambiguous: then a token costs the square of the ways in which it can be read."""

# Single spaces after commas and colons, as they are most often written, and no other white space: a model that may
# write any writes nothing else, sooner or later.  Escapes that spell a character in two ways would let the name of one
# property be written as that of another.
_JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "json_allowed_escapes": 'nrbtf\\"',
}
_NAMES = {
    "json_object": "the JSON object",
    "json_schema": "the JSON schema",
    "regex": "the regular expression",
    "choice": "the list of choices",
    "grammar": "the grammar",
    "text_or_calls": "the grammar of tools",
}
_ANY_TOKENS = '%llguidance {"no_forcing": true}\n'
"""Without this, masks of forced text hold one way to split it into tokens."""


class GrammarCompiler:
    """Compiles grammars for one vocabulary.  Safe to use from several threads at once; compiling releases the GIL.

    Args:
        token_bytes: what each token id adds to a text, in UTF-8.  Empty for those that text is not made of: control
            tokens, the unknown token, ids that must not come.  No grammar allows these.
        vocab_size: bits of a mask: rows of the model's lm_head, at least as many as there are token_bytes.
        end_of_text: ids that may come when an answer may end; none of them is text.

    Raises:
        ValueError: more tokens than vocab_size, or an end_of_text outside it.
    """

    def __init__(self, token_bytes: Sequence[bytes], vocab_size: int, end_of_text: Collection[int]) -> None:
        if len(token_bytes) > vocab_size or not all(0 <= token_id < vocab_size for token_id in end_of_text):
            raise ValueError(
                f"{len(token_bytes)} tokens, end-of-text {sorted(end_of_text)}; expected ids below the vocab_size of "
                f"{vocab_size}"
            )
        # The engine marks tokens of its own with the byte FF, which is in no UTF-8.
        text = [b"" if word.startswith(b"\xff") else word for word in token_bytes]
        text += [b""] * (vocab_size - len(text))
        # It needs an id for the end even where the model has none; whether that may come is decided by `Matcher`.
        ends = sorted(end_of_text) or [next((token_id for token_id, word in enumerate(text) if not word), 0)]
        for token_id in ends:
            text[token_id] = b""
        # A byte that is a piece too has two tokens; the piece's is the later one.
        single = {word: token_id for token_id, word in enumerate(text) if len(word) == 1}
        self._pieces = {
            token_id: single[word]
            for token_id, word in enumerate(text)
            if single.get(word) != token_id and len(word) == 1
        }
        words = _Words(text, ends[0])
        wrapper = TokenizerWrapper(words)
        self._engine = LLTokenizer(wrapper, eos_token=ends)
        words.tokens = wrapper.tokens = []  # copied by the engine, which keeps both objects
        self._vocabulary = Vocabulary(
            text=pack_bits(np.array([bool(word) for word in text])),
            end_of_text=pack_bits(np.isin(np.arange(vocab_size), sorted(end_of_text))),
        )

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer, vocab_size: int, end_of_text: Collection[int]) -> "GrammarCompiler":
        """A compiler for a checkpoint.  With 262,144 tokens it takes about two seconds and 200 MB.

        Args:
            tokenizer: the checkpoint's.
            vocab_size: the model's.
            end_of_text: the ids that end a document.
        """
        return cls(tokenizer.text_bytes(), vocab_size, end_of_text)

    @classmethod
    def for_checking(cls) -> "GrammarCompiler":
        """A compiler that takes no time to make and hardly any memory: its tokens are single bytes.

        What it refuses is refused for any vocabulary.  What it accepts may prove too complex for one of many tokens,
        whose masks cost more, at the first token or at a later one.
        """
        return cls([*(bytes([byte]) for byte in range(256)), b""], 257, [256])

    def compile(self, spec: GrammarSpec) -> Matcher:
        """A matcher at the beginning of an answer.

        Args:
            spec: what the client asks for.

        Raises:
            GrammarError: the grammar is invalid, not supported or too large, or no answer can follow it.
        """
        matcher = Matcher(self._compiled(spec), self._vocabulary, _NAMES[spec.kind])
        # Finds what no answer can follow.  The engine keeps the mask, so that it is not computed twice.
        matcher.mask()
        return matcher

    def compile_forced(self, spec: GrammarSpec) -> ForcedText:
        """What finds the text that a grammar forces, at the beginning of an answer.

        It is compiled for tokens that are bytes, which takes less time and memory than `compile`.

        Args:
            spec: what the client asks for.

        Raises:
            GrammarError: see `compile`.
        """
        return ForcedText(_byte_compiler()._compiled(spec, forcing=True), self._engine, self._pieces)

    def check(self, spec: GrammarSpec) -> None:
        """Refuses what `compile` refuses.

        Raises:
            GrammarError: see `compile`.
        """
        self.compile(spec)

    def _compiled(self, spec: GrammarSpec, *, forcing: bool = False) -> LLMatcher:
        start = 'start: " " @answer' if spec.leading_space else "start: @answer"
        options = "" if forcing else _ANY_TOKENS
        grammars = [{"lark_grammar": options + start}, *_engine_grammars(spec)]
        limits = AMBIGUOUS_LIMITS if spec.kind == "grammar" else LIMITS
        engine = LLMatcher(self._engine, json.dumps({"grammars": grammars}), log_level=0, limits=limits)
        if engine.is_error():
            raise GrammarError(f"{_NAMES[spec.kind]} cannot be followed: {reason(engine.get_error())}")
        return engine


@cache
def _byte_compiler() -> GrammarCompiler:
    return GrammarCompiler.for_checking()


class _Words:
    """A vocabulary in the form that the engine's binding reads."""

    def __init__(self, words: list[bytes], end: int) -> None:
        self.tokens = words
        self.eos_token_id = end
        self.bos_token_id = None
        self.special_token_ids: list[int] = []

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokenizes; never needed, since grammars are compiled with `no_forcing`."""
        raise RuntimeError(f"{text!r} has no fixed tokenization")


def _engine_grammars(spec: GrammarSpec) -> list[dict[str, Any]]:
    """The grammar of an answer, named "answer", in one of the engine's forms, and those that it refers to."""
    if spec.kind not in KINDS:
        raise GrammarError(f"{spec.kind!r} is not a kind of grammar; expected one of {', '.join(KINDS)}")
    name = _NAMES[spec.kind]
    try:
        size = len(spec.text.encode())
    except UnicodeEncodeError:
        raise GrammarError(f"{name} contains a lone surrogate, which is not valid Unicode") from None
    limit = MAX_SCHEMA_TEXT_BYTES if spec.kind in ("json_schema", "text_or_calls") else MAX_SPEC_BYTES
    if size > limit:
        raise GrammarError(f"{name} has {size} bytes; at most {limit} are allowed")
    answer: dict[str, Any]
    parts: list[dict[str, Any]] = []
    match spec.kind:
        case "json_object":
            answer = {"json_schema": {"type": "object", "x-guidance": _JSON_STYLE}}
        case "json_schema":
            answer = {"json_schema": {**read_schema(spec.text, spec.additional_properties), "x-guidance": _JSON_STYLE}}
        case "regex":
            answer = {"lark_grammar": f"start: TEXT\nTEXT: /{_regex(spec.text)}/"}
        case "choice":
            answer = {"lark_grammar": f"start: TEXT\nTEXT: {_choices(spec.text)}"}
        case "grammar":
            answer = {"lark_grammar": read_grammar(spec.text)}
        case "text_or_calls":
            lark, schemas = read_text_or_calls(spec.text, spec.additional_properties)
            answer = {"lark_grammar": lark}
            for name, schema in schemas.items():
                parts.append({"name": name, "json_schema": {**schema, "x-guidance": _JSON_STYLE}})
        case _:
            assert_never(spec.kind)
    return [{"name": "answer", **answer}, *parts]


def _regex(text: str) -> str:
    if not text:
        raise GrammarError("the regular expression is empty")
    if len(text.encode()) > MAX_REGEX_BYTES:
        raise GrammarError(
            f"the regular expression has {len(text.encode())} bytes; at most {MAX_REGEX_BYTES} are allowed; a list of "
            f"choices may be longer"
        )
    if len(re.search(r"\\*$", text)[0]) % 2:  # type: ignore[index]
        raise GrammarError("the regular expression ends in the middle of an escape")
    return regex_to_lark(text, "dws")


def _choices(text: str) -> str:
    choices = read_json(text, "the list of choices")
    if (
        not isinstance(choices, list)
        or not choices
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise GrammarError("the list of choices must be a JSON array of one or more strings, none of them empty")
    if len(choices) > MAX_CHOICES:
        raise GrammarError(f"the list of choices has {len(choices)} choices; at most {MAX_CHOICES} are allowed")
    return " | ".join(json.dumps(choice) for choice in choices)
