"""Matcher: which tokens may come next in one answer."""

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from persimmon.model.grammar_spec import GrammarError

Words = npt.NDArray[np.int32]
"""Bits, 32 to a word: bit i of word w is token 32 * w + i."""


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens are what, as masks.

    Attributes:
        text: tokens that text is made of.
        end_of_text: tokens that end a text.
    """

    text: Words
    end_of_text: Words


class Matcher:
    """Follows one answer through its grammar.  Use it from one thread at a time; `mask` releases the GIL.

    Args:
        engine: a compiled grammar, at the beginning of an answer or further on.
        vocabulary: that it was compiled for.
        name: the grammar in messages, like "the JSON schema".
    """

    def __init__(self, engine: LLMatcher, vocabulary: Vocabulary, name: str) -> None:
        self._engine = engine
        self._vocabulary = vocabulary
        self._name = name

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here.  It may also go on, unless it has `ended`."""
        return self._engine.is_accepting()

    @property
    def ended(self) -> bool:
        """Whether nothing but end-of-text may come."""
        return self._engine.is_stopped() and not self._engine.is_error()

    def mask(self) -> Words:
        """The tokens that may come next, [ceil(vocab_size / 32)] words of bits; see `Words`.

        End-of-text is among them if the answer is complete, and is the only one if it has ended.  Any other token is
        one whose text the grammar allows to follow, so that `consume` takes it.

        Raises:
            GrammarError: the grammar has become too complex to be followed, or no token of the vocabulary can come.
        """
        words = np.empty_like(self._vocabulary.text)
        self._engine.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._raise_error()
        words &= self._vocabulary.text
        if self.is_complete:
            words |= self._vocabulary.end_of_text
        elif not words.any():
            raise GrammarError(
                f"{self._name} cannot be followed: this model's vocabulary has no token that can come next"
            )
        return words

    def consume(self, token_id: int) -> None:
        """Goes on by one token of the answer.

        Raises:
            GrammarError: the token is none of those in `mask`, or the grammar has become too complex.
        """
        if _has(self._vocabulary.end_of_text, token_id):
            allowed = self.is_complete
        else:
            allowed = _has(self._vocabulary.text, token_id)
        if not allowed or not self._engine.consume_token(token_id):
            self._raise_error()
            raise GrammarError(f"token {token_id} does not follow {self._name}")

    def copy(self) -> "Matcher":
        """Another answer that has come as far as this one.  They share what is found out about the grammar."""
        return Matcher(self._engine.deep_copy(), self._vocabulary, self._name)

    def _raise_error(self) -> None:
        if self._engine.is_error():
            raise GrammarError(f"{self._name} cannot be followed: {reason(self._engine.get_error())}")


_REASONS = (
    (r"NoExtension", "no text matches it"),
    (r"too many|Too many|Current row has|fuel|too big|Unable to determine|can't determine", "it is too complex"),
    (r"^panic", "the grammar engine does not accept it"),
    (r"Regex is empty", "no string matches it"),
    (r"^Unsatisfiable schema: anyOf is empty", "no value matches it"),
    (r"^oneOf", "one value may match several schemas of its oneOf, which is not supported; use anyOf"),
    (r"^circular references", "it refers to itself in a schema that has other constraints next to that reference"),
    (r"^min/maxProperties", "minProperties and maxProperties are only supported if all listed properties are required"),
    (r"lookarounds not supported", "anchors and word boundaries within it are not supported"),
)


def reason(message: str) -> str:
    """What went wrong, out of the engine's message of several lines.

    Args:
        message: the engine's.
    """
    for pattern, text in _REASONS:
        if re.search(pattern, message):
            return text
    # Regular expressions are shown with a mark below them, and the reason after that.
    detail = re.search(r"^error: (.+)$", message, re.MULTILINE)
    text = detail[1] if detail else message.strip().split("\n")[0]
    text = text.replace("Unsatisfiable schema", "no value matches it")
    return text if len(text) <= 300 else f"{text[:300]}…"


def pack_bits(bits: npt.NDArray[np.bool_]) -> Words:
    """A mask of single truth values, [vocab_size] -> [ceil(vocab_size / 32)].

    Args:
        bits: one for each token.
    """
    padded = np.zeros((len(bits) + 31) // 32 * 32, dtype=np.bool_)
    padded[: len(bits)] = bits
    return np.packbits(padded, bitorder="little").view("<i4").astype(np.int32, copy=False)


def _has(words: Words, token_id: int) -> bool:
    return 0 <= token_id < 32 * len(words) and bool(words[token_id // 32] >> (token_id % 32) & 1)
