"""`persimmon bench`."""

import argparse
from typing import Any

from persimmon.server.bench import arguments
from persimmon.server.logs import print_line

ERRORS: tuple[type[Exception], ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the benchmark."""
    arguments.add_arguments(parser)


def run(given: dict[str, Any]) -> int:
    """Measures a server; see `persimmon.server.bench.command.bench` for the exit code."""
    from persimmon.server.bench.command import bench  # not for a help text

    return bench(argparse.Namespace(**given), print_line)
