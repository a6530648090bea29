"""Answers the lines of a batch that have no answer yet, a bounded number of them at a time.

Knows the files and the application; nothing of processes, signals or the console.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Protocol

import msgspec
from starlette.types import ASGIApp

from persimmon.server.offline.application import post
from persimmon.server.offline.batch_lines import (
    BatchAnswer,
    BatchRequest,
    LineError,
    read_request,
    respond,
    without_model,
)
from persimmon.server.offline.files import MAX_LINE_BYTES, BatchInput, BatchOutput, Line


class EngineLostError(RuntimeError):
    """The application has no engine any more, so that nothing further can be answered."""


class Progress(Protocol):
    """Counts each line when its answer is in the file."""

    def advance(self, tokens: int) -> None:
        """Counts one more line, for which the engine has read and written `tokens` tokens."""


class _Usage(msgspec.Struct):
    total_tokens: int = 0


class _Body(msgspec.Struct):
    usage: _Usage = msgspec.field(default_factory=_Usage)


_body_decoder = msgspec.json.Decoder(_Body)


@dataclass
class Batch:
    """One run over the input.

    Attributes:
        app: answers the requests.
        source: of the lines.
        output: of the answers, and which lines have one already.
        progress: counts each answer.
        any_model: whether lines are answered whichever model they name.
        stopping: once true, no further line is begun.
    """

    app: ASGIApp
    source: BatchInput
    output: BatchOutput
    progress: Progress
    any_model: bool = False
    stopping: bool = False
    _writes: int = 0
    _saved_writes: int = 0
    _saving: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self, concurrency: int) -> None:
        """Answers every line that has no answer.  Cancelled, it ends what runs; each line in the file is whole.

        Args:
            concurrency: how many lines may run at once.  No more are in memory.

        Raises:
            BatchFileError: a file cannot be read or written.
            EngineLostError: the engine is gone; lines it has not answered are not in the file.
        """
        lines = (line for line in self.source if line not in self.output)
        tasks = [asyncio.create_task(self._answer_some(lines)) for _ in range(concurrency)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer_some(self, lines: Iterator[Line]) -> None:
        while not self.stopping and (line := next(lines, None)) is not None:
            try:
                request = _request(line)
            except LineError as error:
                await self._save(error.answer, 0)
                continue
            body = without_model(request.body_bytes) if self.any_model else request.body_bytes
            response = await post(self.app, request.url, body)
            if response.status == HTTPStatus.SERVICE_UNAVAILABLE:
                raise EngineLostError
            tokens = _body_decoder.decode(response.body).usage.total_tokens if response.status == HTTPStatus.OK else 0
            await self._save(respond(request, response.status, response.body), tokens)

    async def _save(self, answer: BatchAnswer, tokens: int) -> None:
        """Returns when the answer is on the disk; answers that come while others are written share the next sync."""
        self.output.write(answer)
        self._writes = own = self._writes + 1
        async with self._saving:
            if self._saved_writes < own:
                writes = self._writes
                await asyncio.to_thread(self.output.sync)
                self._saved_writes = writes
        self.progress.advance(tokens)


def _request(line: Line) -> BatchRequest:
    if line.text is None:
        raise LineError(
            line=line.number,
            custom_id=None,
            code="line_too_long",
            message=f"The line is longer than {MAX_LINE_BYTES} bytes.",
        )
    return read_request(line.text, line.number)
