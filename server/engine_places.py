"""Which engine of a server a process is, and the part of the machine that is its own.  Imports no torch.

Knows cores and GPUs, and nothing of what engines do with them.
"""

import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from persimmon.model.cores import core_shares, usable_cores
from persimmon.model.gpus import visible_gpus
from persimmon.server.settings.section import SettingsError


@dataclass(frozen=True, slots=True)
class MachineShare:
    """What one engine may use of a machine.

    Attributes:
        cores: that it runs on; empty for all.
        threads: that compute on a CPU; None for one for each core.
        gpus: as CUDA_VISIBLE_DEVICES names them; None for those that the process would see anyway.
        memory_bytes: of the host's memory that it may plan with; None for what is free when it plans.
    """

    cores: frozenset[int] = frozenset()
    threads: int | None = None
    gpus: str | None = None
    memory_bytes: int | None = None

    def take(self) -> None:
        """Keeps this process, and those that it starts, to the share; called before torch is imported."""
        if self.gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus
        if self.cores:
            os.sched_setaffinity(0, self.cores)
        if self.threads is not None:
            os.environ.setdefault("OMP_NUM_THREADS", str(self.threads))


WHOLE_MACHINE = MachineShare()


@dataclass(frozen=True, slots=True)
class EnginePlace:
    """One engine among those of its server.

    Attributes:
        address: the ZeroMQ endpoint to bind, like "ipc:///run/persimmon/engine".
        vitals: the file that its heart beats in; None for nowhere.
        index: its number, from 0.
        count: how many engines there are.
        share: its part of the machine.
    """

    address: str
    vitals: Path | None = None
    index: int = 0
    count: int = 1
    share: MachineShare = WHOLE_MACHINE


def machine_shares(engines: int, ranks: int = 1) -> list[MachineShare]:
    """The part of the machine that each engine gets: GPUs, or without GPUs some cores.

    Args:
        engines: how many there are.
        ranks: processes of an engine, each of which needs a GPU or a core.

    Raises:
        SettingsError: there are fewer GPUs, or fewer cores, than the engines and their ranks need.
    """
    needed = engines * ranks
    if needed == 1:
        return [WHOLE_MACHINE]
    sizes = {"--data-parallel-size": engines, "--tensor-parallel-size": ranks}
    asked = " and ".join(f"{flag} is {size}" for flag, size in sizes.items() if size > 1)
    gpus = [] if version("torch").endswith("+cpu") else visible_gpus()
    if gpus and needed > len(gpus):
        raise SettingsError(
            f"{asked}, which needs {needed} GPUs, but {_counted(len(gpus), 'GPU')} visible: lower it, or "
            f"hide GPUs with CUDA_VISIBLE_DEVICES= to serve on the CPU"
        )
    cores = usable_cores()
    if not gpus and needed > cores:
        raise SettingsError(f"{asked}, which needs {needed} cores, but {_counted(cores, 'core')} usable: lower it")
    if engines == 1:
        return [WHOLE_MACHINE]
    if gpus:
        return [MachineShare(gpus=",".join(gpus[begin : begin + ranks])) for begin in range(0, needed, ranks)]
    if cores < len(os.sched_getaffinity(0)):
        # A control group limits the time on cores that others use too, so no core is anyone's own.
        return [MachineShare(threads=cores // engines)] * engines
    return [MachineShare(cores=own) for own in core_shares(engines)]


def _counted(count: int, unit: str) -> str:
    return f"only {count} {unit}{' is' if count == 1 else 's are'}"
