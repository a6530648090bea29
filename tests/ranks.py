"""A network on several ranks, of which the test's own process is the first."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from persimmon.server.config import read_settings
from persimmon.server.engine import rank_cores
from persimmon.server.engine.loading import LoadedModel, load_model
from tests.engine_harness import Harness

SMALL = {"block_size": "16", "max_num_seqs": "32", "max_model_len": "512", "kv_cache_memory": "64MiB"}


@contextlib.contextmanager
def on_ranks(count: int, folder: Path, **settings: str) -> Iterator[LoadedModel]:
    """Loads a checkpoint as an engine of this many ranks does, each with one thread, for the length of a block."""
    asked = read_settings(SMALL | {"tensor_parallel_size": str(count)} | settings).of_engine()
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        # More ranks than cores are only slow.
        with mock.patch.object(rank_cores, "usable_cores", return_value=count):
            loaded = load_model(asked, folder, lambda line: None)
        try:
            yield loaded
        finally:
            if loaded.followers is not None:
                loaded.followers.close()
                dist.destroy_process_group()
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def harness_on(loaded: LoadedModel, num_blocks: int | None = None, **options: Any) -> Harness:
    """An engine on these ranks, with fewer blocks than they have if asked."""
    return Harness(
        loaded.executor.model, num_blocks=num_blocks or loaded.plan.num_blocks, runner=loaded.runner, **options
    )
