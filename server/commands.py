"""What the `persimmon` commands do, and their flags; `persimmon.server.cli` calls them."""

import argparse
import contextlib
import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from persimmon import model
from persimmon.model.chat import chat_format
from persimmon.model.config import DTYPES, PersimmonConfig, check_vocabulary
from persimmon.model.errors import CheckpointError
from persimmon.model.hub import resolve
from persimmon.model.memory_limits import memory_left
from persimmon.model.tokenizer import Tokenizer
from persimmon.model.vocabulary import VocabularyMap
from persimmon.server.bench.arguments import add_arguments as add_bench_arguments
from persimmon.server.config import GROUPS, Settings, add_arguments, read_settings
from persimmon.server.console import interruptible
from persimmon.server.http.endpoints.model_use import USES, ModelUse
from persimmon.server.http.middleware.access import check as check_access
from persimmon.server.http.middleware.gate import Limits
from persimmon.server.logs import configure as configure_log
from persimmon.server.logs import in_background, say
from persimmon.server.memory_need import check_memory
from persimmon.server.offline.command import generate as answer_batch
from persimmon.server.offline.files import BatchFileError
from persimmon.server.runtime_folder import RuntimeFolderError
from persimmon.server.settings.section import SettingsError
from persimmon.server.shortage import raise_open_files, too_few_files
from persimmon.server.supervisor import ListenError, supervise

DEMO_NAME = "persimmon-demo"


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line.

    Returns:
        The exit code: 2 for anything that the person at the console can fix, after one line that says how.
    """
    given = vars(_parser().parse_args(arguments))
    command = given.pop("command")
    with in_background() if command == "serve" else contextlib.nullcontext():
        try:
            return _run(command, given)
        except (SettingsError, CheckpointError, ListenError, RuntimeFolderError, BatchFileError) as error:
            say(f"persimmon: error: {error}")
            return 2


def _run(command: str, given: dict[str, Any]) -> int:
    if command == "convert":
        return convert(**given)
    if command == "bench":
        return bench(given)
    if command == "generate":
        source, out, any_model = given.pop("batch_source"), given.pop("batch_out"), given.pop("any_model")
        return generate(read_settings(given), source, out, any_model)
    return serve(read_settings(given))


def serve(settings: Settings) -> int:
    """Serves until told to stop; see `persimmon.server.supervisor.supervise` for the exit code.

    Raises:
        SettingsError: keys or certificates cannot be read, or a package is missing.
        CheckpointError: the checkpoint cannot be found, or is not one that this server serves.
        ListenError: the address cannot be listened on.
        RuntimeFolderError: there is no place for the sockets of the server's processes.
    """
    configure_log("supervisor", settings.log_format, settings.log_level)
    check_access(settings)
    sequences = Limits.of(settings).sequences
    warning = too_few_files(raise_open_files(), sequences or 0, settings.api_workers)
    if warning is not None:
        say(f"persimmon: warning: {warning}")
    folder, name, use = _checkpoint(settings, settings.api_workers)
    return supervise(settings, folder, name, use)


def generate(settings: Settings, source: Path, out: Path, any_model: bool) -> int:
    """Answers a batch file; see `persimmon.server.offline.command.generate` for the exit code.

    Raises:
        CheckpointError: the checkpoint cannot be found, or is not one that this server serves.
        BatchFileError: a file cannot be used.
    """
    folder, name, _ = _checkpoint(settings, api_workers=0)
    return answer_batch(settings, folder, name, source, out, any_model)


def _checkpoint(settings: Settings, api_workers: int) -> tuple[Path, str, ModelUse]:
    """The checkpoint's folder, its name in the API and what it is for; says on the console what it is."""
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
    check_memory(config, api_workers, memory_left())
    tokenizer = Tokenizer.from_folder(folder, add_bos=settings.add_bos_token)
    vocabulary = VocabularyMap.from_folder(folder, config)
    check_vocabulary(folder, vocabulary.original(config) if vocabulary else config, tokenizer.vocab_size)
    chat = chat_format(folder, config, tokenizer, settings.add_bos_token)
    say(f"persimmon {importlib.metadata.version('persimmon-server')}: {what}")
    for notice in tokenizer.notices:
        say(f"persimmon: {notice}")
    if chat.template is not None:
        say("persimmon: conversations are rendered by the checkpoint's own chat template")
    return folder, name, USES[config.architecture]


def convert(
    source: str,
    out: Path,
    from_adept: bool,
    dtype: str | None,
    max_shard_size: int,
    trim_vocab: bool,
    drop_ids: tuple[range, ...] | None,
) -> int:
    """Converts a checkpoint to safetensors; see `persimmon.model.convert.convert_checkpoint`.

    Raises:
        CheckpointError: the source is not such a checkpoint, or the result cannot be written.
    """
    from persimmon.model.convert import convert_checkpoint  # brings torch, which no other part of this process needs

    try:
        with interruptible():
            convert_checkpoint(
                source,
                out,
                from_adept=from_adept,
                dtype=dtype,
                max_shard_bytes=max_shard_size,
                print_line=say,
                trim_vocab=trim_vocab,
                drop_ids=drop_ids,
            )
    except KeyboardInterrupt:
        say("persimmon: stopped; the same command goes on from here")
        return 130
    return 0


def bench(given: dict[str, Any]) -> int:
    """Measures a server; see `persimmon.server.bench.command.bench` for the exit code."""
    from persimmon.server.bench.command import bench as measure  # brings what no other command needs

    return measure(argparse.Namespace(**given), say)


def _size(text: str) -> int:
    try:
        size = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        size = ByteSize(0)
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid size; use for example 5GB or 800MiB")
    return size


def _token_ids(text: str) -> tuple[range, ...]:
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,8})(?:-(\d{1,8}))?", part, re.ASCII)
        ids = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not ids:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not a token id or a range of them; expected one like 3-70002"
            )
        ranges.append(ids)
    return tuple(ranges)


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
    add_bench_arguments(
        commands.add_parser(
            "bench",
            help="measure a server with OpenAI's API",
            description="Measure the speed and latency of any server with OpenAI's API. Every request is streamed, at "
            "temperature 0; tokens are counted by the server's usage, times from sending a request. The exit code is "
            "1 when a request failed.",
        )
    )
    generator = commands.add_parser(
        "generate",
        help="answer a batch file without a server",
        description="Answer the lines of a batch file in OpenAI's format. Answers are added to OUT as they come, in "
        "any order; lines that have one there are left out, so a run that was stopped goes on when the same command "
        "runs again. The exit code is 0 when every line has what it asked for, 1 when some failed.",
    )
    generator.add_argument("batch_source", metavar="IN.jsonl", type=Path, help="the requests, one a line")
    generator.add_argument("batch_out", metavar="OUT.jsonl", type=Path, help="the answers, one a line")
    generator.add_argument(
        "--any-model",
        action="store_true",
        help="answer lines whichever model they name, such as gpt-4o-mini in a file that was written for OpenAI. "
        "Default: a line that names another model fails",
    )
    add_arguments(generator, [key for key in GROUPS if key not in ("http", "access", "log", "load")])
    converter = commands.add_parser(
        "convert",
        help="convert a checkpoint to safetensors",
        description="Convert a Persimmon checkpoint to safetensors in Hugging Face layout. Nothing in its files is "
        "executed. The result is compared with the source, number by number. A conversion that was stopped goes on "
        "where it was when the same command runs again.",
    )
    converter.add_argument("source", metavar="IN", help="a folder in Hugging Face layout, or a Hub id")
    converter.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    converter.add_argument(
        "--from-adept",
        action="store_true",
        help="IN is Adept's own release: the tar, or the folder it unpacks to",
    )
    converter.add_argument("--dtype", choices=DTYPES, help="the type to store tensors in. Default: as they are")
    converter.add_argument(
        "--max-shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="tensors are spread over files of at most this size. Default: %(default)s",
    )
    trimming = converter.add_mutually_exclusive_group()
    trimming.add_argument(
        "--trim-vocab",
        action="store_true",
        help="drop the embedding's and lm_head's rows of token ids that no text gives and no file of the checkpoint "
        "names. Token ids stay what they are, for this server keeps the map",
    )
    trimming.add_argument(
        "--drop-ids",
        type=_token_ids,
        metavar="IDS",
        help="drop the rows of these ids, like 3-70002,71020, which you know to be unused",
    )
    return parser
