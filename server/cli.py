"""The `persimmon` command."""

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

import model
from model.config import PersimmonConfig, check_vocabulary
from model.errors import CheckpointError
from model.hub import resolve
from model.tokenizer import Tokenizer
from server.config import Settings, SettingsError, add_arguments, read_settings
from server.supervisor import ListenError, say, supervise

DEMO_NAME = "persimmon-demo"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line.

    Returns:
        The exit code: 2 for anything the person at the console can mend, after one line that says how.
    """
    given = vars(_parser().parse_args(arguments))
    del given["command"]
    try:
        settings = read_settings(given)
        return serve(settings)
    except (SettingsError, CheckpointError, ListenError) as error:
        say(f"persimmon: error: {error}")
        return 2


def serve(settings: Settings) -> int:
    """Serves until told to stop; see `server.supervisor.supervise` for the exit code.

    Raises:
        CheckpointError: the checkpoint cannot be found, or is not one that this server serves.
        ListenError: the address cannot be listened on.
    """
    if settings.model is None:
        folder = Path(next(iter(model.__path__)), "demo")
        name = settings.served_model_name or DEMO_NAME
        what = "the demo checkpoint, which explains common English words; --model serves another"
    else:
        folder = resolve(settings.model)
        name = settings.served_model_name or Path(settings.model).resolve().name
        what = str(settings.model)
    # What is quick to check is checked before any process starts.
    config = PersimmonConfig.from_folder(folder)
    tokenizer = Tokenizer.from_folder(folder, add_bos=settings.add_bos_token)
    check_vocabulary(folder, config, tokenizer.vocab_size)
    say(f"persimmon {importlib.metadata.version('persimmon-server')}: {what}")
    return supervise(settings, folder, name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="persimmon",
        description="An inference server for Adept's Persimmon models.",
    )
    version = importlib.metadata.version("persimmon-server")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_arguments(
        commands.add_parser(
            "serve",
            help="serve a checkpoint over HTTP",
            description="Serve a Persimmon checkpoint over an OpenAI-style HTTP API. "
            "Every flag is also an environment variable; a flag wins.",
        )
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
