"""Tokens as people read them, with where they stand in an answer and how probable they were.

Knows nothing of how an endpoint writes them.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from persimmon.model.token_logprobs import TokenLogprobs
from persimmon.model.tokenizer import IncrementalDetokenizer, Tokenizer

_MIN_LOGPROB = -9999.0
"""What stands for a probability of zero, whose logarithm JSON cannot write; as in OpenAI's answers."""


@dataclass(frozen=True, slots=True)
class TokenText:
    r"""What a token adds to a text.

    Attributes:
        name: its text; for bytes that are not whole characters "bytes:\xe2"; for a token that is not text its piece.
        utf8: its bytes; None for a token that is not text.
    """

    name: str
    utf8: bytes | None

    def without_prefix(self, prefix: str) -> "TokenText":
        """The same, with what the chat format put before it taken off."""
        if self.utf8 is None:
            return self
        return TokenText(self.name.removeprefix(prefix), self.utf8.removeprefix(prefix.encode()))


@dataclass(frozen=True, slots=True)
class TokenReport:
    """One token of an answer, or of a prompt that is echoed.

    Attributes:
        text: what it adds.
        offset: characters of the answer before it.
        logprob: its natural log-probability under the network's own logits; None for a prompt's first token.
        top: the most probable tokens in its place and their log-probabilities, best first.
    """

    text: TokenText
    offset: int
    logprob: float | None = None
    top: Sequence[tuple[TokenText, float]] = ()

    def without_prefix(self, prefix: str) -> "TokenReport":
        """The same, as the first of a chat's answer."""
        return replace(
            self,
            text=self.text.without_prefix(prefix),
            top=[(text.without_prefix(prefix), logprob) for text, logprob in self.top],
        )


@lru_cache(maxsize=2**16)  # answers that report several tokens for each of theirs ask again and again
def token_text(tokenizer: Tokenizer, token_id: int) -> TokenText:
    """What a token adds to a text, for people."""
    if token_id >= tokenizer.vocab_size:
        return TokenText(f"token_id:{token_id}", None)
    utf8 = tokenizer.token_bytes(token_id)
    if not utf8:
        return TokenText(tokenizer.pieces([token_id])[0], None)
    try:
        return TokenText(utf8.decode(), utf8)
    except UnicodeDecodeError:
        return TokenText("bytes:" + "".join(f"\\x{byte:02x}" for byte in utf8), utf8)


def report(tokenizer: Tokenizer, token_id: int, offset: int, logprobs: TokenLogprobs | None) -> TokenReport:
    """A token with what the engine said of it."""
    text = token_text(tokenizer, token_id)
    if logprobs is None:
        return TokenReport(text, offset)
    top = [
        (token_text(tokenizer, top_id), max(top_logprob, _MIN_LOGPROB))
        for top_id, top_logprob in zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)
    ]
    return TokenReport(text=text, offset=offset, logprob=max(logprobs.logprob, _MIN_LOGPROB), top=top)


def read_prompt(
    tokenizer: Tokenizer, detokenizer: IncrementalDetokenizer, token_ids: Sequence[int]
) -> Iterator[tuple[int, str, str]]:
    """Each token of a prompt, the text that is certain now and was not before, and what stood before that.

    The last is the space that SentencePiece puts before a text: it comes with the text's first token, and is not part
    of it.

    Args:
        tokenizer: of the served model.
        detokenizer: a new one; what follows the prompt may be pushed into it later.
        token_ids: the prompt's.
    """
    prefixed = tokenizer.begins_with_prefix(token_ids)
    for token_id in token_ids:
        text = detokenizer.push((token_id,))
        prefix = text[:1] if prefixed else ""
        prefixed = prefixed and not text
        yield token_id, text.removeprefix(prefix), prefix


class ReportQueue:
    """Holds the reports of an answer's tokens back until something of their text is out.

    So a stream never reports text that turns out to belong to a stop string.
    """

    def __init__(self) -> None:
        self._waiting: deque[TokenReport] = deque()

    def add(self, reports: Iterable[TokenReport]) -> None:
        """Takes the next tokens."""
        self._waiting.extend(reports)

    def visible(self, length: int) -> list[TokenReport]:
        """The tokens that begin within the first `length` characters of the answer, each once."""
        out = []
        while self._waiting and self._waiting[0].offset < length:
            out.append(self._waiting.popleft())
        return out

    def rest(self) -> list[TokenReport]:
        """All others."""
        out = list(self._waiting)
        self._waiting.clear()
        return out
