"""How every process of the server writes to the console: lines for people, or one JSON object a line for programs.

Knows what a line looks like, not what is logged.
"""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from persimmon.server.log_writer import LogWriter

LogFormat = Literal["text", "json"]

LogLevel = Literal["debug", "info", "warning", "error"]

LAST_SECONDS = 2.0
"""How long the last lines of a process may take to be read."""

TERMINAL_SECONDS = 0.2
"""How long a line for people may take to reach a terminal, which may be stopped with Ctrl-S."""

_console = logging.getLogger("persimmon.console")

_background: list[LogWriter] = []
"""The writer of this process; empty where lines are written at once."""


def configure(process: str, log_format: LogFormat = "text", log_level: LogLevel = "info") -> None:
    """Sends the log of this process to the console.

    Args:
        process: its name among those of the server.
        log_format: of all lines, those of `print_line` included.
        log_level: minimum level of this server's own lines; those of `print_line` are always written, and those of
            libraries from warnings on.
    """
    level = logging.getLevelNamesMapping()[log_level.upper()]
    handler = _StandardError()
    handler.setFormatter(_Json(process) if log_format == "json" else _Text(process))
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler], force=True)
    logging.getLogger("persimmon").setLevel(level)
    for own in _console.handlers:
        own.setFormatter(_Json(process) if log_format == "json" else None)


def print_line(line: str) -> None:
    """One line for the person at the console; without a time, unless the log is JSON."""
    _console.info("%s", line)
    if _background and os.isatty(2):
        _background[0].flush(TERMINAL_SECONDS)  # before a progress bar is drawn there, which does not come through here


@contextlib.contextmanager
def in_background() -> Iterator[None]:
    """For the length of a block, log lines wait in memory when standard error does not take them.

    A pipe whose reader has stopped reading then stops no request.
    """
    try:
        writer = LogWriter(2, _dropped_notice)
    except RuntimeError:  # the system allows no thread: lines are written directly
        yield
        return
    _background.append(writer)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        _background.remove(writer)
        writer.close(LAST_SECONDS)


def flush() -> None:
    """Waits a little until the lines of this process are written."""
    for writer in _background:
        writer.flush(LAST_SECONDS)


@contextlib.contextmanager
def error_logged() -> Iterator[None]:
    """Makes an error that leaves the block, the whole of a process, a line of the log and exit code 1."""
    try:
        yield
    except Exception:
        logging.getLogger(__name__).critical("the process is exiting because of an error", exc_info=True)
        sys.exit(1)


def with_fields(**fields: Any) -> Mapping[str, Any]:
    """What a logging call takes as `extra`, to add facts to its message; those that are None are left out."""
    return {"fields": {name: value for name, value in fields.items() if value is not None}}


def _dropped_notice(lines: int) -> str:
    record = logging.LogRecord(
        name=__name__,
        level=logging.WARNING,
        pathname=__file__,
        lineno=0,
        msg="%d log line%s dropped here: standard error was blocked",
        args=(lines, " was" if lines == 1 else "s were"),
        exc_info=None,
    )
    handlers = logging.getLogger().handlers or _console.handlers
    return handlers[0].format(record)


class _StandardError(logging.Handler):
    """Writes to what is standard error at the time, or leaves that to the background."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            if _background:
                _background[0].put(line)
            else:
                print(line, file=sys.stderr, flush=True)
        except Exception:  # noqa: BLE001, logging handles a line that cannot be written
            self.handleError(record)


class _Text(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process}: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802, logging's name
        shown = [f"{name}={_shown(value)}" for name, value in _fields(record).items()]
        return " ".join([super().formatMessage(record), *shown])


class _Json(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname,
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # The line's own names win: a field must not say who wrote the line or when.
        return json.dumps({**line, **_fields(record), **line}, ensure_ascii=False, default=str)


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return fields


def _shown(value: Any) -> str:
    """A value on a line of text, in which spaces part the fields."""
    if isinstance(value, str) and value.isprintable() and " " not in value and value:
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _prepare_console() -> None:
    handler = _StandardError()
    _console.addHandler(handler)
    _console.setLevel(logging.INFO)
    _console.propagate = False


_prepare_console()
