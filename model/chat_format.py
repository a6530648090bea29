"""Chat turns as Persimmon was trained to read them: `human: …`, a blank line, `adept: …`.

Knows nothing of tokens, of HTTP or of how an answer is generated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

STOP = "\n\nhuman:"
"""Ends an answer: the model is starting the human's next turn."""

_BLANK_LINE = "\n\n"
_SYSTEM_ROLES = ("system", "developer")
_LABELS = {"user": "human:", "assistant": "adept:", "tool": "human:"}


class ChatFormatError(ValueError):
    """A conversation that the format cannot hold.  The message is a sentence for the client."""


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: "system" (or "developer", which is the same), "user", "assistant" or "tool": a function's result.
        content: the message's text, rendered as it is.
    """

    role: str
    content: str


def check_roles(roles: Sequence[str]) -> None:
    """Checks that a conversation can be answered, by who speaks in it.

    Args:
        roles: of its messages.

    Raises:
        ChatFormatError: no messages, a role that the format lacks, or a final message from the assistant.
    """
    for number, role in enumerate(roles):
        if role not in _LABELS and role not in _SYSTEM_ROLES:
            raise ChatFormatError(
                f"messages[{number}] has the role {role!r}, which this model's chat format lacks: "
                f"allowed are {', '.join([*_SYSTEM_ROLES, *_LABELS])}"
            )
    spoken = [role for role in roles if role in _LABELS]
    if not roles or (spoken and spoken[-1] == "assistant"):
        found = "the last one is from the assistant" if spoken else "there is none"
        raise ChatFormatError(
            f"the conversation must end with a user or tool message for the model to answer, but {found} (apart from "
            f"system messages)"
        )


def render(turns: Sequence[Turn], begin_answer: bool = True) -> str:
    r"""The prompt whose continuation is the assistant's next answer.

    Turns are joined by blank lines: `human: {prompt}\n\nadept: {answer}\n\nhuman: {follow_up}\n\nadept:`.
    The format has two speakers who take turns; other messages are mapped to it:

    - System messages are collected in order, from any position, and put before the first turn, each followed by a blank
    line. Empty ones are left out.
    - Tool results become a turn of the human, because the assistant reads them like user messages.
    - Consecutive messages of one side become one turn, joined by blank lines.

    The format has no escapes: a message that contains a blank line and "human:" reads like two turns.

    A conversation of system messages only is answered right after them.

    Args:
        turns: at least one.
        begin_answer: end with `adept:`.

    Raises:
        ChatFormatError: as `check_roles`.
    """
    check_roles([turn.role for turn in turns])
    spoken = [turn for turn in turns if turn.role in _LABELS]
    parts = [turn.content for turn in turns if turn.role in _SYSTEM_ROLES and turn.content]
    for label, neighbours in groupby(spoken, key=lambda turn: _LABELS[turn.role]):
        parts.append(f"{label} {_BLANK_LINE.join(turn.content for turn in neighbours)}")
    return _BLANK_LINE.join([*parts, _LABELS["assistant"]] if begin_answer else parts)


class AnswerText:
    """Removes the space after `adept:` from an answer that comes in pieces.

    `render` ends with the bare label, so the model writes the space itself: one leading space is the
    format's, any further ones are the answer's.  Push one answer's deltas, as the detokenizer gives them, and
    look for stop strings in what comes out: that is the text the client sees.
    """

    def __init__(self) -> None:
        self._begun = False

    def push(self, delta: str) -> str:
        """The next piece of the answer; nothing is ever held back."""
        if self._begun or not delta:
            return delta
        self._begun = True
        return delta.removeprefix(" ")
