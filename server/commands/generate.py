"""`persimmon generate`."""

import argparse
from pathlib import Path
from typing import Any

from persimmon.model.errors import CheckpointError
from persimmon.server import config
from persimmon.server.offline.errors import BatchFileError
from persimmon.server.runtime_folder import RuntimeFolderError
from persimmon.server.settings.section import SettingsError

ERRORS: tuple[type[Exception], ...] = (SettingsError, CheckpointError, RuntimeFolderError, BatchFileError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the files, and a flag for every setting of a server that does not listen."""
    parser.add_argument("batch_source", metavar="IN.jsonl", type=Path, help="the requests, one per line")
    parser.add_argument("batch_out", metavar="OUT.jsonl", type=Path, help="the answers, one per line")
    parser.add_argument(
        "--any-model",
        action="store_true",
        help="answer lines whatever model they name, such as gpt-4o-mini in a file written for OpenAI. Default: a "
        "line that names another model fails",
    )
    config.add_arguments(parser, config.EMBEDDED_GROUPS)


def run(given: dict[str, Any]) -> int:
    """Answers a batch file; see `persimmon.server.offline.command.generate` for the exit code.

    Raises:
        SettingsError: a setting is invalid.
        CheckpointError: the checkpoint cannot be found, or is not one that this server serves.
        RuntimeFolderError: there is no place for the engine's socket.
        BatchFileError: a file cannot be used.
    """
    from persimmon.server.offline.command import generate  # not for a help text

    return generate(given.pop("batch_source"), given.pop("batch_out"), given.pop("any_model"), given)
