"""The configurations of the engine whose tokens are compared.  Data; needs none of the engine's packages."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.gpu.suite import Setting
from persimmon.kernels.fused import FusedKernels
from persimmon.kernels.invariant import InvariantKernels


@dataclass(frozen=True, slots=True)
class Variant:
    """How an engine is set up.

    Attributes:
        name: for people.
        overlap: whether a step is launched while the one before it runs.
        graphs: whether decode steps are CUDA graphs.
        prefix_caching: whether prompts share blocks.
        scarce: whether there are so few blocks that sequences are preempted.
        chunked: whether prompts are cut into chunks much shorter than they are.
        alone: whether each request has the engine to itself; only the first of them run.
    """

    name: str
    overlap: bool = True
    graphs: bool = True
    prefix_caching: bool = True
    scarce: bool = False
    chunked: bool = False
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Mode:
    """How the network computes.

    Attributes:
        prefix: of its variants' names.
        kernels: the operations.
        exact: whether tokens must be equal where they are tied, too.
    """

    prefix: str
    kernels: type[FusedKernels]
    exact: bool


MODES = (
    Mode("", FusedKernels, exact=False),
    Mode("batch-invariant, ", InvariantKernels, exact=True),
)

VARIANTS = (
    Variant("engine"),
    Variant("without overlap", overlap=False),
    Variant("without graphs", graphs=False),
    Variant("with scarce blocks", scarce=True),
    Variant("without prefix cache", prefix_caching=False),
    Variant("with short chunks", chunked=True),
    Variant("one request at a time", alone=True),
)


def variants(setting: Setting) -> Sequence[Variant]:
    """The usual engine first; in the interpreter only one other, which differs in everything."""
    if setting.on_gpu:
        return VARIANTS
    other = Variant("other", overlap=False, graphs=False, prefix_caching=False, scarce=True)
    return replace(VARIANTS[0], chunked=True), other


def modes(setting: Setting) -> Sequence[Mode]:
    """All of them on a GPU; elsewhere the first only, because tests interpret the other one."""
    return MODES if setting.on_gpu else MODES[:1]
