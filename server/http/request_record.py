"""What is known of one HTTP request while it is answered: who asked, what came of it and when.

Knows nothing about how that is reported: metrics, the access log and traces read it when the answer has ended.
"""

import re
import secrets
import time
from collections import Counter
from dataclasses import dataclass, field

from starlette.types import Scope

REQUEST_ID_HEADER = "x-request-id"

# Long enough for UUIDs, ULIDs and W3C ids with a prefix; none of the characters means anything in a log or a header.
_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@~-]{1,128}")
_SCOPE_KEY = "persimmon.record"


def _new_id() -> str:
    # As many bits as a UUID has, in half of the time.
    return secrets.token_hex(16)


@dataclass(slots=True)
class RequestRecord:
    """One request.  All times are of time.perf_counter's clock.

    Attributes:
        request_id: the client's own, or one made for it.
        arrival: when it came.
        key: the name of the API key that it came with; None where the server asks for none.
        max_priority: how urgent its key may be; None for the server-wide limit.
        share: of the engine, relative to other keys'.
        cache_salt: keeps the prefixes of this client apart from others' in the prefix cache; empty shares them.
        prompt_tokens: of all its prompts.
        cached_tokens: of these, found in the prefix cache.
        output_tokens: of all its answers.
        queue_seconds: how long its first sequence waited to be computed; None before that.
        first_token: when its first token came; None before that.
        finish_reasons: how many of its sequences ended how.
        prompts: its prompts, if the server is to log them; else None.
        error: why it was refused or failed; None otherwise.
        error_param: the field of the request that was at fault, if one was.
    """

    request_id: str = field(default_factory=_new_id)
    arrival: float = field(default_factory=time.perf_counter)
    key: str | None = None
    max_priority: int | None = None
    share: int = 1
    cache_salt: bytes = b""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    queue_seconds: float | None = None
    first_token: float | None = None
    finish_reasons: Counter[str] = field(default_factory=Counter)
    prompts: list[str | list[int]] | None = None
    error: str | None = None
    error_param: str | None = None

    @property
    def owner(self) -> str:
        """Whose request it is, as the engine and the gate count clients: the name of its key, empty without one."""
        return self.key or ""

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from its arrival to its first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def finish_reason(self) -> str | None:
        """How its sequences ended, like "stop" or "length,stop"; None where none did."""
        return ",".join(sorted(self.finish_reasons)) or None

    def attach(self, scope: Scope) -> None:
        """Makes it the record of an ASGI connection."""
        scope[_SCOPE_KEY] = self


def record_of(scope: Scope) -> RequestRecord:
    """The record that was attached to an ASGI connection.

    Raises:
        LookupError: none was.
    """
    record = attached_record(scope)
    if record is None:
        raise LookupError("no record is attached to this request")
    return record


def attached_record(scope: Scope) -> RequestRecord | None:
    """The record that was attached to an ASGI connection; None where none was."""
    record = scope.get(_SCOPE_KEY)
    return record if isinstance(record, RequestRecord) else None


def header(scope: Scope, name: bytes) -> str | None:
    """A request's first header of this name; None where there is none.

    For what every request is asked: starlette's `Headers` takes several times as long to say that there is none.

    Args:
        scope: of an ASGI connection.
        name: in lower case.
    """
    for own, value in scope["headers"]:
        if own == name:
            return bytes(value).decode("latin-1")
    return None


def request_id(scope: Scope) -> str:
    """The id that a client gave its request, if it can stand in a header and in a log, else a new one."""
    given = header(scope, REQUEST_ID_HEADER.encode())
    return given if given and _SANE_ID.fullmatch(given) else _new_id()
