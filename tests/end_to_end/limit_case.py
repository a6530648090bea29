"""A request at a limit, what it gets, and short ways to write one down."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
TOKENIZE = "/tokenize"
DETOKENIZE = "/detokenize"
EMBEDDINGS = "/v1/embeddings"
CLASSIFY = "/classify"
ADEPT = "/api"

NOT_JSON = "not valid JSON"

HALF_PAIR = "\ud800"
"""Half of a surrogate pair, which no text holds; JSON can spell it as an escape."""


@dataclass(frozen=True)
class Case:
    """One request.

    Attributes:
        name: unique within its path, for people.
        path: the endpoint.
        content: makes the body; some are too large to keep.
        status: of the answer.
        says: what an error's message contains.
        headers: sent with it, besides those that every client sends.
    """

    name: str
    path: str
    content: Callable[[], bytes]
    status: int
    says: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """The HTTP method."""
        return "PUT" if self.path == ADEPT else "POST"


_BODIES: Mapping[str, Mapping[str, object]] = {
    COMPLETIONS: {"prompt": "Hello", "max_tokens": 2},
    CHAT: {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2},
    EMBEDDINGS: {"input": "Hello"},
    ADEPT: {"prompts": ["Hello"], "tokens_to_generate": 2},
}


def served(name: str, path: str = COMPLETIONS, /, **fields: object) -> Case:
    return request(name, path, 200, "", fields)


def refused(name: str, says: str, path: str = COMPLETIONS, /, **fields: object) -> Case:
    return request(name, path, 400, says, fields)


def request(name: str, path: str, status: int, says: str, fields: Mapping[str, object]) -> Case:
    # json writes NaN and Infinity, which JSON does not have, and half pairs as escapes.
    return Case(name, path, lambda: json.dumps({**_BODIES.get(path, {}), **fields}).encode(), status, says)


def raw(name: str, content: bytes, status: int, says: str = "", path: str = COMPLETIONS, **headers: str) -> Case:
    sent = {key.replace("_", "-"): value for key, value in headers.items()}
    return Case(name, path, lambda: content, status, says, sent)
