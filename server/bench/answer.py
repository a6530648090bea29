"""Reads a streamed answer of OpenAI's completions or chat endpoint: when its text came, and what its usage says.

Knows nothing of connections or of other answers.
"""

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from persimmon.server.bench.http_client import Response

QUOTED_CHARACTERS = 300


class RequestFailedError(Exception):
    """One request was not answered as asked.

    Attributes:
        kind: what went wrong, in words that failures of one cause share.
        detail: what this one said of it.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail


@dataclass(frozen=True)
class Answer:
    """One streamed answer; times in seconds of time.perf_counter().

    Attributes:
        started: when the request was sent.
        arrivals: when each chunk with text was read.
        finished: when the response ended.
        text: all of it.
        prompt_tokens: by the server's usage.
        completion_tokens: by the server's usage.
    """

    started: float
    arrivals: tuple[float, ...]
    finished: float
    text: str
    prompt_tokens: int
    completion_tokens: int

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from sending the request to reading its first text; None for an answer without text."""
        return self.arrivals[0] - self.started if self.arrivals else None

    @property
    def time_per_output_token(self) -> float | None:
        """Seconds per token after the first chunk; None for fewer than two tokens."""
        if self.completion_tokens < 2 or not self.arrivals:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.completion_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between consecutive chunks with text."""
        return [later - earlier for earlier, later in pairwise(self.arrivals)]


def read_answer(response: Response, expected_tokens: int | None) -> Answer:
    """An answer from a whole response.

    Args:
        response: as it arrived.
        expected_tokens: how many tokens it must have; None for any number, and then it may have no text.

    Raises:
        RequestFailedError: an error response, an error in the stream, an answer that is not such a stream, no usage, no
            text, or another number of tokens than expected.
    """
    if response.status != 200:
        raise RequestFailedError(f"HTTP {response.status}", error_message(response.body))
    arrivals: list[float] = []
    text: list[str] = []
    usage: dict[str, Any] | None = None
    try:
        for read_at, data in response.events():
            if data == b"[DONE]":
                break
            chunk = json.loads(data)
            if "error" in chunk:
                raise RequestFailedError("error in the stream", error_message(data))
            usage = chunk.get("usage") or usage
            if piece := "".join(map(_text, chunk["choices"])):
                arrivals.append(read_at)
                text.append(piece)
        else:
            raise RequestFailedError("the stream ended without [DONE]")
        if usage is None:
            raise RequestFailedError("no usage in the stream", "though stream_options.include_usage was set")
        prompt_tokens, completion_tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RequestFailedError("not a stream of OpenAI's chunks", f"{type(error).__name__}: {error}") from None
    if expected_tokens is not None and completion_tokens != expected_tokens:
        raise RequestFailedError(f"{completion_tokens} tokens instead of the requested {expected_tokens}")
    if expected_tokens is not None and not arrivals:
        raise RequestFailedError("no text in the stream")
    return Answer(
        started=response.started,
        arrivals=tuple(arrivals),
        finished=response.finished,
        text="".join(text),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
    )


def error_message(body: bytes) -> str:
    """What an error in OpenAI's shape says, or the beginning of a body that has another."""
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = body.decode(errors="replace")
    return " ".join(message.split())[:QUOTED_CHARACTERS]


def _text(choice: dict[str, Any]) -> str:
    """The text of a chunk's choice: of a completion, or of a chat message, its reasoning included."""
    delta = choice.get("delta")
    if delta is None:
        return str(choice["text"])
    return "".join(str(delta.get(name) or "") for name in ("reasoning_content", "reasoning", "content"))
