"""What a grammar forces: text that has to come next in an answer, and the tokens that probably spell it.

It follows the grammar byte by byte, next to the `Matcher` whose masks decide which tokens may come.  What it finds are
guesses: text can be split into tokens in several ways, so an answer never depends on it.  Knows nothing of sequences.
"""

from collections.abc import Mapping, Sequence

from llguidance import LLMatcher, LLTokenizer

MAX_TEXT = 96
"""Bytes after which it looks no further; each takes about a microsecond."""

FEW_BYTES = 16
"""Where at most this many bytes may come next, as within a number or one of several words, text may soon be forced."""

END = 256
"""The end of an answer in the masks of `ForcedText`'s engine; smaller numbers are bytes."""

_SPACE = ord(" ")


class ForcedText:
    """Follows one answer and finds what its grammar forces next.  Use it from one thread at a time.

    Where the only choice is whether to write a space, as between the items of JSON, it is taken to be written or left
    out as it was last time.

    Args:
        engine: the compiled grammar at the beginning of an answer; its tokens are bytes, and `END`.
        vocabulary: the tokens of answers.
        pieces: by a token that stands for one byte, the one that text has instead, where there are two.
    """

    def __init__(self, engine: LLMatcher, vocabulary: LLTokenizer, pieces: Mapping[int, int]) -> None:
        self._engine = engine
        self._vocabulary = vocabulary
        self._pieces = pieces
        # What came since the engine was last asked.
        self._unread = b""
        # What was found last, counted from what had come then.
        self._expected = b""
        self._with_space = True
        self._near = True

    def copy(self) -> "ForcedText":
        """One for another answer; this one is at its beginning."""
        return ForcedText(self._engine.deep_copy(), self._vocabulary, self._pieces)

    def guess(self, token_ids: Sequence[int], count: int, others: Sequence[int] = ()) -> tuple[list[int], int]:
        """Tokens that may come next.

        It looks for them after a byte that ends a word, and where there was little choice before.

        Args:
            token_ids: what the answer got since the last call.
            count: maximum number of guesses; at least 1.
            others: guesses that were made without the grammar.  They are kept as far as they spell what is forced,
                because they show how the model splits it, and beyond it.

        Returns:
            The guesses, and how many of the first are forced; no guesses where nothing is forced.
        """
        came = self._spelled(token_ids)
        self._learn(came)
        self._unread += came
        self._expected = b""
        if not (self._near or _ends_word(came)) or not self._follow():
            return [], 0
        self._expected = text = self._look_ahead()
        guesses: list[int] = []
        length = 0
        for token_id in others:
            spelled = self._spelled([token_id])
            forced = text[length : length + len(spelled)]
            if not spelled.startswith(forced):
                break
            if len(forced) < len(spelled):
                return (list(others[:count]), len(guesses)) if guesses else ([], 0)
            guesses.append(token_id)
            length += len(spelled)
        # A token of what comes after it is likely to begin with the last space.
        guesses += self._split(text[length:].rstrip(b" "))
        return guesses[:count], min(count, len(guesses))

    def _learn(self, came: bytes) -> None:
        """Takes notice of whether a space came that might have been left out."""
        for expected, byte in zip(self._expected, came, strict=False):
            if expected != byte:
                if _SPACE in (expected, byte):
                    self._with_space = byte == _SPACE
                return

    def _follow(self) -> bool:
        """Goes on to the end of what came; whether the grammar allows that, and has not become too complex."""
        unread, self._unread = self._unread, b""
        return self._engine.consume_tokens(list(unread))

    def _look_ahead(self) -> bytes:
        """What is forced."""
        text = b""
        engine, choices = self._engine, 1
        while len(text) < MAX_TEXT:
            forced = engine.compute_ff_bytes()
            if not forced:
                forced, choices = self._space(engine)
                if not forced:
                    break
            if engine is self._engine:
                engine = engine.deep_copy()
            engine.consume_tokens(list(forced))
            text += forced
        self._near = bool(text) or choices <= FEW_BYTES
        return text

    def _space(self, engine: LLMatcher) -> tuple[bytes, int]:
        """The byte that is expected where a space may come or be left out; and how many bytes may come."""
        allowed = int.from_bytes(engine.compute_bitmask(), "little")
        space = 1 << _SPACE
        choices = allowed.bit_count()
        if choices != 2 or not allowed & space or allowed >> END:
            return b"", choices
        expected = space if self._with_space else allowed ^ space
        return bytes([expected.bit_length() - 1]), choices

    def _spelled(self, token_ids: Sequence[int]) -> bytes:
        """The text of tokens; something that no grammar allows where one has no text."""
        return self._vocabulary.decode_bytes(list(token_ids))

    def _split(self, text: bytes) -> list[int]:
        """Tokens that spell a text, each the longest that fits; they leave out an unfinished character at its end."""
        try:
            whole = text.decode()
        except UnicodeDecodeError as error:
            whole = text[: error.start].decode()
        token_ids = self._vocabulary.greedy_tokenize(whole) if whole else []
        return [self._pieces.get(token_id, token_id) for token_id in token_ids]


def _ends_word(text: bytes) -> bool:
    """Whether a text ends in an ASCII character that is neither a letter nor a digit."""
    return text[-1:] < b"\x80" and not text[-1:].isalnum()
