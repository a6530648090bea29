"""The pieces in which an answer comes, the whole that they make, and a count of their tokens."""

import math
from dataclasses import dataclass, field, replace

import msgspec
from msgspec import UNSET

from persimmon.model.tool_calls import CallDelta, ToolCall
from persimmon.server.http.generation.generation import Generation
from persimmon.server.http.generation.token_report import TokenReport
from persimmon.server.http.schemas.usage import PromptTokensDetails, Usage


class Piece(msgspec.Struct, frozen=True):
    """What one output of the engine adds to one choice.

    Attributes:
        choice: its index.
        text: new text, certain not to be part of a stop string or of a call; perhaps empty.
        token_ids: new tokens, a stop token included, none after the one that completed a stop string or the calls.
        finish_reason: "stop", "length" or "tool_calls" with the last piece, else None.
        cached_tokens: prompt tokens that came from the prefix cache.
        reports: tokens, one after the other, whose text is certain now, where the request asked for reports.  In a
            completion all of them come in the end; in a chat those that are not part of the text do not.
        logprob: the sum of the new tokens' log-probabilities, where the engine reported them.
        calls: what is added to the calls of tools.
    """

    choice: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    cached_tokens: int
    reports: list[TokenReport] = []
    logprob: float = 0.0
    calls: list[CallDelta] = []


@dataclass(slots=True)
class Answer:
    """A whole choice, gathered from its pieces."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    reports: list[TokenReport] = field(default_factory=list)
    logprob: float = 0.0
    calls: list[ToolCall] = field(default_factory=list)

    @property
    def mean_logprob(self) -> float:
        """How probable its tokens were, for one of them; lowest where there is none."""
        return self.logprob / len(self.token_ids) if self.token_ids else -math.inf

    def add(self, piece: Piece) -> None:
        """Takes the choice's next piece."""
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.finish_reason = piece.finish_reason
        self.reports += piece.reports
        self.logprob += piece.logprob
        for delta in piece.calls:
            if delta.name is not None:
                self.calls.append(ToolCall(delta.name, delta.arguments))
            else:
                call = self.calls[delta.index]
                self.calls[delta.index] = replace(call, arguments=call.arguments + delta.arguments)


class UsageCount:
    """Counts the tokens of a request while its pieces come."""

    def __init__(self, generation: Generation) -> None:
        self._samples = generation.samples
        self._prompt_tokens = sum(len(prompt.token_ids) for prompt in generation.prompts)
        self._image_tokens = sum(prompt.num_image_tokens for prompt in generation.prompts)
        self._completion_tokens = 0
        self._cached_tokens = [0] * len(generation.prompts)

    def add(self, piece: Piece) -> None:
        """Takes the next piece of any choice."""
        self._completion_tokens += len(piece.token_ids)
        prompt, sample = divmod(piece.choice, self._samples)
        if sample == 0:  # the others find the blocks of the first one
            self._cached_tokens[prompt] = piece.cached_tokens

    @property
    def usage(self) -> Usage:
        """The count so far."""
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=self._prompt_tokens + self._completion_tokens,
            prompt_tokens_details=PromptTokensDetails(
                sum(self._cached_tokens), image_tokens=self._image_tokens or UNSET
            ),
        )
