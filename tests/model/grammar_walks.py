"""Answers made of random tokens that a grammar allows, and texts spelled in tokens."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from persimmon.model.grammar import GrammarCompiler, GrammarSpec, Matcher
from persimmon.model.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "model" / "demo"
END_OF_TEXT = 1
VOCAB_SIZE = 4100  # four rows more than the tokenizer has pieces

TOKENIZER = Tokenizer.from_folder(DEMO)
WORDS = TOKENIZER.text_bytes()
COMPILER = GrammarCompiler.for_tokenizer(TOKENIZER, VOCAB_SIZE, [END_OF_TEXT])

# Tokens that bring an answer nearer to its end, wherever they may come.
_CLOSERS = {END_OF_TEXT, *(token_id for token_id, word in enumerate(WORDS) if word in (b'"', b"}", b"]"))}


def compile_json(schema: str) -> Matcher:
    return COMPILER.compile(GrammarSpec("json_schema", schema))


def allowed(matcher: Matcher) -> list[int]:
    bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
    return [int(token_id) for token_id in np.flatnonzero(bits)]


def tokens_of(text: bytes, words: Sequence[bytes] = WORDS) -> list[int]:
    """Token ids that spell a text byte by byte."""
    return [words.index(text[index : index + 1]) for index in range(len(text))]


def accepts(matcher: Matcher, text: str | bytes) -> bool:
    """Whether a text is a whole answer.  The matcher is left where it is."""
    at = matcher.copy()
    for token_id in tokens_of(text.encode() if isinstance(text, str) else text):
        if token_id not in allowed(at):
            return False
        at.consume(token_id)
    return at.is_complete


def random_answer(matcher: Matcher, rng: random.Random, most_tokens: int = 400) -> str | None:
    """The text of a random walk to end-of-text; None where it does not get there.

    On the way, everything that a mask allows can be consumed, and nothing else.
    """
    answer: list[int] = []
    for _ in range(most_tokens):
        choices = allowed(matcher)
        for token_id in rng.sample(choices, min(3, len(choices))):
            matcher.copy().consume(token_id)
        closers = [token_id for token_id in choices if token_id in _CLOSERS]
        token_id = rng.choice(closers if closers and rng.random() < 0.5 else choices)
        matcher.consume(token_id)
        if token_id == END_OF_TEXT:
            return b"".join(WORDS[token_id] for token_id in answer).decode()
        answer.append(token_id)
    return None
