"""The grammars that clients send, checked in a thread of their own before the engine gets them.

Knows which field of a request a grammar is in; nothing of what else the request asks for.
"""

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from http import HTTPStatus

from persimmon.model.grammar import GrammarCompiler, GrammarError, GrammarSpec
from persimmon.server.http.errors import ApiError, bad_request
from persimmon.server.http.schemas.constraint import Constraint

MAX_REMEMBERED = 128
"""Grammars whose check is remembered, the latest used ones.  Each may be 1 MiB long; a hash of it is kept."""

MAX_WAITING = 512
"""Grammars that may wait for their check, which takes milliseconds, or a second for the worst that there are."""

_RETRY_AFTER = 1


class GrammarChecker:
    """Refuses the grammars that the engine would refuse, without holding up the event loop.

    Args:
        compiler: of any vocabulary, since none decides what compiles.
    """

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        # One thread, because the engine wants the other cores.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-checker")
        self._waiting: dict[bytes, asyncio.Future[str | None]] = {}
        self._known: OrderedDict[bytes, str | None] = OrderedDict()

    async def check(self, constraint: Constraint) -> None:
        """Returns when the constraint's grammar can be used.

        Raises:
            ApiError: it cannot be; the error names the field.  Or too many grammars wait for their check.
        """
        reason = await self._verdict(constraint.grammar)
        if reason is None:
            return
        for part in constraint.parts:
            await self.check(part)
        raise bad_request(f"Invalid '{constraint.field}': {reason}.", constraint.field)

    async def _verdict(self, grammar: GrammarSpec) -> str | None:
        """Why a grammar cannot be used, or None."""
        digest = blake2b(repr(grammar).encode(), digest_size=32).digest()
        if digest in self._known:
            self._known.move_to_end(digest)
            return self._known[digest]
        verdict = self._waiting.get(digest)
        if verdict is None:
            if len(self._waiting) >= MAX_WAITING:
                raise ApiError(
                    HTTPStatus.SERVICE_UNAVAILABLE,
                    f"The server is checking grammars, and {MAX_WAITING} more are waiting. Please try again shortly.",
                    type="server_error",
                    code="too_many_grammars",
                    retry_after=_RETRY_AFTER,
                )
            verdict = asyncio.wrap_future(self._thread.submit(self._reason_against, grammar))
            self._waiting[digest] = verdict
            verdict.add_done_callback(partial(self._remember, digest))
        # Others may wait for it too when this request is cancelled.
        return await asyncio.shield(verdict)

    def _remember(self, digest: bytes, verdict: "asyncio.Future[str | None]") -> None:
        del self._waiting[digest]
        if verdict.exception() is None:
            self._known[digest] = verdict.result()
            if len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)

    def _reason_against(self, grammar: GrammarSpec) -> str | None:
        try:
            self._compiler.check(grammar)
        except GrammarError as error:
            return str(error)
        return None
