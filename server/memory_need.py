"""What the server's processes take besides the model, and whether there is room for them.  Imports no torch.

The numbers are the private memory of each process with the demo (RssAnon in /proc/PID/status), rounded up.  Those of
the engine and the API workers grow with the vocabulary.
"""

from dataclasses import replace

import psutil

from persimmon.model.config import PersimmonConfig
from persimmon.model.memory_limits import MemoryLeft
from persimmon.model.sizes import readable
from persimmon.server.settings.engine import BODIES_TOGETHER
from persimmon.server.settings.section import SettingsError

MIB = 1 << 20
SUPERVISOR_BYTES = 72 * MIB
WORKER_BYTES = 80 * MIB
ENGINE_BYTES = 176 * MIB
"""With torch imported, and nothing loaded."""
ENGINE_GROWTH_BYTES = 32 * MIB
"""What an engine takes after it has planned, beyond its plan: threads' stacks, and what the allocator cannot reuse."""
WORKER_IMAGE_BYTES = 320 * MIB
"""Of a model that reads images: those that are kept, and the largest one while it is decoded."""
WORKER_BYTES_PER_TOKEN = 256
"""Of the vocabulary: the tokenizer."""
ENGINE_BYTES_PER_TOKEN = 512
"""Of the vocabulary: what answers with a grammar need, which is made after the plan."""


def check_memory(config: PersimmonConfig, api_workers: int, left: MemoryLeft, ranks: int = 1, engines: int = 1) -> None:
    """Checks that there is room for the processes, before any is started.

    Whether the model fits too is found out when it is planned, in the engine.

    Args:
        config: the network, for its vocabulary.
        api_workers: how many there will be.
        left: what may be taken.
        ranks: processes of an engine.
        engines: how many there will be.

    Raises:
        SettingsError: there is not.
    """
    # This process is the supervisor, and has most of its memory already.
    needed = engines * ranks * (ENGINE_BYTES + ENGINE_GROWTH_BYTES) + api_workers * WORKER_BYTES
    needed += (engines * ENGINE_BYTES_PER_TOKEN + api_workers * WORKER_BYTES_PER_TOKEN) * config.vocab_size
    if left.bytes < needed:
        processes = "an engine" if engines == 1 else f"{engines} engines"
        processes += f" of {ranks} ranks" if ranks > 1 else ""
        workers = f"{api_workers} API worker{'s' if api_workers != 1 else ''}"
        raise SettingsError(
            f"not enough memory: {processes} and {workers} take about {readable(needed)} before any model is loaded, "
            f"but only {readable(left.bytes)} are {left}: raise that limit, or use a larger machine"
        )


def still_to_be_taken(config: PersimmonConfig, api_workers: int, max_body_bytes: int) -> int:
    """Bytes that this engine and the other processes of its server will take beyond what they have, without the model.

    Args:
        config: the network, for its vocabulary.
        api_workers: how many there are.
        max_body_bytes: of one request; each worker may receive several of them at once.
    """
    others = SUPERVISOR_BYTES + api_workers * _worker_bytes(config, max_body_bytes)
    return _growth_bytes(config) + max(0, others - _taken_by_others())


def share_of_memory(
    config: PersimmonConfig, engines: int, ranks: int, api_workers: int, max_body_bytes: int, left: MemoryLeft
) -> int:
    """Bytes of the host's memory that each of several engines may plan with, from before any process is started.

    An engine that plans with what it finds free would take what another, which starts at the same time, has planned
    with but not taken yet.

    Args:
        config: the network, for its vocabulary.
        engines: how many there will be.
        ranks: processes of an engine.
        api_workers: how many there will be.
        max_body_bytes: of one request.
        left: what may be taken by all processes.
    """
    needed = api_workers * _worker_bytes(config, max_body_bytes)
    own = ranks * ENGINE_BYTES + (ranks - 1) * ENGINE_GROWTH_BYTES + _growth_bytes(config)
    return max(0, (left.bytes - needed) // engines - own)


def within_share(left: MemoryLeft, share: int | None, reserved: int) -> MemoryLeft:
    """What an engine may plan with.

    Args:
        left: what is left on its device.
        share: of `share_of_memory`; None for no bound.
        reserved: bytes of the share that are for other things.
    """
    return left if share is None else replace(left, bytes=max(0, min(left.bytes, share - reserved)))


def _worker_bytes(config: PersimmonConfig, max_body_bytes: int) -> int:
    images = 0 if config.vision is None else WORKER_IMAGE_BYTES
    return WORKER_BYTES + images + WORKER_BYTES_PER_TOKEN * config.vocab_size + BODIES_TOGETHER * max_body_bytes


def _growth_bytes(config: PersimmonConfig) -> int:
    """What the first rank of an engine takes after it has planned, beyond its plan."""
    return ENGINE_GROWTH_BYTES + ENGINE_BYTES_PER_TOKEN * config.vocab_size


def _taken_by_others() -> int:
    """Private memory of this process's parent and siblings, in bytes."""
    taken = 0
    this = psutil.Process()
    parent = this.parent()
    others = [] if parent is None else [parent, *parent.children()]
    for process in others:
        try:
            memory = process.memory_info()
        except psutil.Error:  # it has ended
            continue
        if process.pid != this.pid:
            taken += max(0, memory.rss - memory.shared)
    return taken
