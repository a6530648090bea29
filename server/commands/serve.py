"""`persimmon serve`."""

import argparse
from dataclasses import replace
from typing import Any

from persimmon.model.errors import CheckpointError
from persimmon.server import config
from persimmon.server.listening import ListenError
from persimmon.server.logs import configure as configure_log
from persimmon.server.logs import print_line
from persimmon.server.runtime_folder import RuntimeFolderError
from persimmon.server.settings.section import SettingsError
from persimmon.server.shortage import raise_open_files, too_few_files

ERRORS: tuple[type[Exception], ...] = (SettingsError, CheckpointError, ListenError, RuntimeFolderError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every setting."""
    config.add_arguments(parser)


def run(given: dict[str, Any]) -> int:
    """Serves until asked to stop; see `persimmon.server.supervisor.supervise` for the exit code.

    Raises:
        SettingsError: a setting is invalid, keys or certificates cannot be read, a package is missing, or there are
            fewer GPUs or cores than engines and their ranks.
        CheckpointError: the checkpoint cannot be found, or is not one that this server serves.
        ListenError: the address cannot be listened on.
        RuntimeFolderError: the folder for the sockets of the server's processes cannot be created.
    """
    # Not for a help text.
    from persimmon.model.config import PersimmonConfig
    from persimmon.model.memory_limits import memory_left
    from persimmon.model.sizes import readable
    from persimmon.server.engine_places import machine_shares
    from persimmon.server.free_memory import return_free_memory
    from persimmon.server.http.middleware.access import check as check_access
    from persimmon.server.http.middleware.gate import Limits
    from persimmon.server.memory_need import share_of_memory
    from persimmon.server.served_model import ServedModel
    from persimmon.server.supervisor import supervise

    settings = config.read_settings(given)
    configure_log("supervisor", settings.log_format, settings.log_level)
    check_access(settings)
    shares = machine_shares(settings.data_parallel_size, settings.tensor_parallel_size)
    sequences = Limits.of(settings).sequences
    warning = too_few_files(raise_open_files(), sequences or 0, settings.api_workers)
    if warning is not None:
        print_line(f"persimmon: warning: {warning}")
    served = ServedModel.find(settings, settings.api_workers, len(shares))
    return_free_memory()  # the tokenizer's, which was only checked
    for line in served.notices:
        print_line(line)
    if len(shares) > 1 and shares[0].gpus is None:
        network = PersimmonConfig.from_folder(served.folder)
        memory = share_of_memory(
            network,
            engines=len(shares),
            ranks=settings.tensor_parallel_size,
            api_workers=settings.api_workers,
            max_body_bytes=settings.max_body_size,
            left=memory_left(),
        )
        shares = [replace(share, memory_bytes=memory) for share in shares]
        print_line(
            f"persimmon: {len(shares)} engines, each with its own copy of the weights; each may plan with "
            f"{readable(memory)} of memory"
        )
    return supervise(settings, served.folder, served.name, served.use, shares)
