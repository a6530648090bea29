"""Reads a command line and runs its command; `persimmon.server.cli` calls it.

Knows the commands' names and what they are for.  `persimmon --version` and `--help` import no command.
"""

import argparse
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from persimmon.server.logs import in_background, print_line


class Module(Protocol):
    """A command's file.

    Attributes:
        ERRORS: what the person at the console can fix, whose message is one line that says how.
    """

    ERRORS: tuple[type[Exception], ...]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the command's flags."""

    def run(self, given: dict[str, Any]) -> int:
        """Runs the command with the flags that were given, by name; returns the exit code."""


@dataclass(frozen=True, slots=True)
class Command:
    """One of the commands.

    Attributes:
        help: for the list of all commands.
        description: for its own help text.
        load: imports its file.
    """

    help: str
    description: str
    load: Callable[[], Module]


def _serve() -> Module:
    from persimmon.server.commands import serve

    return serve


def _bench() -> Module:
    from persimmon.server.commands import bench

    return bench


def _generate() -> Module:
    from persimmon.server.commands import generate

    return generate


def _convert() -> Module:
    from persimmon.server.commands import convert

    return convert


COMMANDS = {
    "serve": Command(
        "serve a checkpoint over HTTP",
        "Serve a Persimmon checkpoint over an OpenAI-style HTTP API. "
        "Every flag is also an environment variable; a flag wins.",
        _serve,
    ),
    "bench": Command(
        "measure a server with OpenAI's API",
        "Measure the speed and latency of any server with OpenAI's API. Every request is streamed, at temperature 0. "
        "Token counts come from the server's usage; times start when a request is sent. The exit code is 1 if a "
        "request failed.",
        _bench,
    ),
    "generate": Command(
        "answer a batch file without a server",
        "Answer the lines of a batch file in OpenAI's format. Answers are appended to OUT as they finish, in any "
        "order. Lines that already have an answer there are skipped, so running the same command again continues a "
        "stopped run. The exit code is 0 if every line succeeded, 1 if some failed.",
        _generate,
    ),
    "convert": Command(
        "convert a checkpoint to safetensors",
        "Convert a Persimmon checkpoint to safetensors in Hugging Face layout. No code in its files is executed. The "
        "result is compared with the source, number by number. Running the same command again continues a stopped "
        "conversion.",
        _convert,
    ),
}


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line.

    Returns:
        The exit code: 2 for anything that the person at the console can fix, after one line that says how.
    """
    given = vars(_parser().parse_args(arguments))
    name = given.pop("command")
    command = COMMANDS[name].load()
    with in_background() if name == "serve" else contextlib.nullcontext():
        try:
            return command.run(given)
        except command.ERRORS as error:
            print_line(f"persimmon: error: {error}")
            return 2


class _CommandParser(argparse.ArgumentParser):
    """A command's parser, which gets its arguments when there is a command line for it.

    Args:
        load: imports the command's file.
        options: of any parser.
    """

    def __init__(self, *, load: Callable[[], Module], **options: Any) -> None:
        super().__init__(**options)
        self._load = load

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._load().add_arguments(self)
        return super().parse_known_args(args, namespace)


class _Version(argparse.Action):
    """Prints the version, which takes reading the installation's metadata."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"{parser.prog} {version('persimmon-server')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="persimmon",
        description="An inference server for Adept's Persimmon models.",
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_CommandParser)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, description=command.description, load=command.load)
    return parser
