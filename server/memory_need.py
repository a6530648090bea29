"""What the server's processes take besides the model, and whether there is room for them.  Imports no torch.

The numbers are the private memory of each process with the demo (RssAnon in /proc/PID/status), rounded up.  Those of
the engine and the API workers grow with the vocabulary.
"""

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
WORKER_BYTES_PER_TOKEN = 256
"""Of the vocabulary: the tokenizer."""
ENGINE_BYTES_PER_TOKEN = 512
"""Of the vocabulary: what answers with a grammar need, which is made after the plan."""


def check_memory(config: PersimmonConfig, api_workers: int, left: MemoryLeft, ranks: int = 1) -> None:
    """Checks that there is room for the processes, before any is started.

    Whether the model fits too is found out when it is planned, in the engine.

    Args:
        config: the network, for its vocabulary.
        api_workers: how many there will be.
        left: what may be taken.
        ranks: processes of the engine.

    Raises:
        SettingsError: there is not.
    """
    # This process is the supervisor, and has most of its memory already.
    needed = ranks * (ENGINE_BYTES + ENGINE_GROWTH_BYTES) + api_workers * WORKER_BYTES
    needed += (ENGINE_BYTES_PER_TOKEN + api_workers * WORKER_BYTES_PER_TOKEN) * config.vocab_size
    if left.bytes < needed:
        engine = "an engine" if ranks == 1 else f"an engine of {ranks} ranks"
        workers = f"{api_workers} API worker{'s' if api_workers != 1 else ''}"
        raise SettingsError(
            f"not enough memory: {engine} and {workers} take about {readable(needed)} before any model is loaded, "
            f"but only {readable(left.bytes)} are {left}: raise that limit, or use a larger machine"
        )


def still_to_be_taken(config: PersimmonConfig, api_workers: int, max_body_bytes: int) -> int:
    """Bytes that this engine and the other processes of its server will take beyond what they have, without the model.

    Args:
        config: the network, for its vocabulary.
        api_workers: how many there are.
        max_body_bytes: of one request; each worker may receive several of them at once.
    """
    worker = WORKER_BYTES + WORKER_BYTES_PER_TOKEN * config.vocab_size + BODIES_TOGETHER * max_body_bytes
    others = SUPERVISOR_BYTES + api_workers * worker
    return ENGINE_GROWTH_BYTES + ENGINE_BYTES_PER_TOKEN * config.vocab_size + max(0, others - _taken_by_others())


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
