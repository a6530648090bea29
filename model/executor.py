"""How steps run on each kind of device: one executor for each kind, chosen by `executor_for` and nowhere else.

An executor owns what differs between kinds: how the network runs and tokens are drawn, which steps have a faster way,
what memory steps take, whether they overlap and need a warm-up.  Knows nothing of scheduling.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from persimmon.kernels import Kernels, StepLimits
from persimmon.kernels.cpu.native import NativeKernels
from persimmon.model.config import PersimmonConfig
from persimmon.model.kv_cache import KVCache
from persimmon.model.native_draw import NativeDraw
from persimmon.model.persimmon import Persimmon, Step
from persimmon.model.recorded_network import RecordedNetwork
from persimmon.model.recorded_shard import RecordedShard
from persimmon.model.row_sampling import RowSampling
from persimmon.model.sampler import Samples, sample

if TYPE_CHECKING:
    from persimmon.model.runner import SequenceInput


class Executor(ABC):
    """Runs the steps of one network on one kind of device.

    It is made before the network, because it knows what memory steps take and which kernels weights are prepared for;
    `start` gives it the network and its cache.

    Args:
        kernels: the operations.

    Attributes:
        overlaps: whether a step is best launched while the one before it runs.
        compiles: whether each kind of step is compiled when it first runs, so that a warm-up has to run all of them.
        model, cache: what it runs, from `start` on.
    """

    overlaps: ClassVar[bool] = False
    compiles: ClassVar[bool] = False
    model: Persimmon
    cache: KVCache

    def __init__(self, kernels: Kernels[Any, Any]) -> None:
        self.kernels = kernels
        self._sampled = torch.zeros(0, dtype=torch.int64)

    @property
    @abstractmethod
    def name(self) -> str:
        """What computes, for people."""

    @property
    def preparation(self) -> str | None:
        """What `start` does that takes a while, for people; None where it takes none."""
        return None

    @property
    def max_guess_rows(self) -> int | None:
        """Maximum tokens of a step with guesses, where it is limited: such a step has no prompts.  0 allows none."""
        return None

    def step_buffers(self, config: PersimmonConfig, dtype: torch.dtype, limits: StepLimits) -> int:
        """Bytes that steps within these limits take from start to end beyond weights, cache and activations."""
        del config, dtype
        return self.kernels.workspace_bytes(limits)

    def reserve(self, limits: StepLimits) -> None:
        """Makes the buffers that steps within these limits share."""
        self.kernels.reserve(limits)

    def start(
        self, model: Persimmon, cache: KVCache, progress: Callable[[Sequence[int]], Iterable[int]] = iter
    ) -> Self:
        """Makes ready to run a network; where buffers have to be reserved, that comes first.

        Args:
            model: the network, prepared for `kernels`.
            cache: its keys and values.
            progress: wraps the parts of what is prepared, to show how far it is.

        Returns:
            Itself.
        """
        del progress
        self.model, self.cache = model, cache
        return self

    def plan(self, batch: "Sequence[SequenceInput]") -> Any:
        """Where keys and values of a step go and who attends to what, as `Kernels.plan_attention` makes it.

        Args:
            batch: sequences with one token come first, then those with guesses, then all others, each by length.
        """
        cache = self.cache
        return self.kernels.plan_attention(
            [item.block_table for item in batch],
            [item.start for item in batch],
            [len(item.token_ids) for item in batch],
            num_blocks=cache.num_blocks,
            num_heads=cache.num_heads,
            block_size=cache.block_size,
            dtype=cache.dtype,
            device=cache.device,
        )

    @abstractmethod
    def forward(self, step: Step) -> torch.Tensor:
        """As `Persimmon.forward`."""

    @abstractmethod
    def sample(self, hidden: torch.Tensor, params: Sequence[RowSampling]) -> Samples:
        """A token a row: [R, hidden] and R settings to R tokens on the same device."""

    def decode(self, batch: "Sequence[SequenceInput]") -> Samples | None:
        """Starts a step for which there is a faster way: such as one where every sequence draws at each of its tokens.

        Returns:
            What is drawn, which is also what `sampled` begins with; None where the step has to go through `forward`.
        """
        del batch
        return None

    def states(self, batch: "Sequence[SequenceInput]", rows: Sequence[int]) -> torch.Tensor | None:
        """Starts the network's part of a step for which there is a faster way than `forward`.

        Args:
            batch: sequences with one token come first.
            rows: the tokens whose states are wanted.

        Returns:
            [R, hidden], as of `forward`; None where the step has to go through `forward`.
        """
        del batch, rows
        return None

    @property
    def replays(self) -> int:
        """How many steps were CUDA graphs."""
        return 0

    @property
    def sampled(self) -> torch.Tensor:
        """[*] int64 on the device: the tokens of the last step, which the next may begin with."""
        return self._sampled

    def keep(self, tokens: torch.Tensor) -> None:
        """Leaves a step's tokens where the next finds them."""
        self._sampled = tokens

    def fetch(self, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.cuda.Event | None]:
        """What a step has made, copied to the host without waiting for the step.

        Args:
            tensors: contiguous, on the device, with elements of 4 or 8 bytes; the next step may overwrite them.

        Returns:
            The tensors in host memory, and the event after which their numbers are there; None where they are there
            already.
        """
        return [tensor.clone() for tensor in tensors], None


class TorchExecutor(Executor):
    """Plain torch: a CPU for which there are no C kernels."""

    @property
    def name(self) -> str:
        """What computes, for people."""
        return f"cpu ({torch.get_num_threads()} threads, plain torch, no C kernels)"

    def forward(self, step: Step) -> torch.Tensor:
        """Operation by operation."""
        return self.model.forward(step, self.cache)

    def sample(self, hidden: torch.Tensor, params: Sequence[RowSampling]) -> Samples:
        """From the logits, in plain torch."""
        return sample(self.model.logits(hidden), params)


class NativeExecutor(Executor):
    """A CPU with the C kernels: the network is a program that one call runs, or a few that ranks sum between."""

    kernels: NativeKernels

    @property
    def name(self) -> str:
        """What computes, for people."""
        return f"cpu ({torch.get_num_threads()} threads, {self.kernels.build} kernels)"

    def start(
        self, model: Persimmon, cache: KVCache, progress: Callable[[Sequence[int]], Iterable[int]] = iter
    ) -> Self:
        """Records the network."""
        self._recorded = (
            RecordedNetwork(model, cache, self.kernels)
            if model.ranks is None
            else RecordedShard(model=model, ranks=model.ranks, cache=cache, kernels=self.kernels)
        )
        self._draw = NativeDraw(self.kernels)
        return super().start(model, cache, progress)

    def forward(self, step: Step) -> torch.Tensor:
        """The program, or a program up to each sum over ranks."""
        return self._recorded.forward(step)

    def sample(self, hidden: torch.Tensor, params: Sequence[RowSampling]) -> Samples:
        """From the logits, in C."""
        return sample(self.model.logits(hidden), params, draw=self._draw)


def executor_for(
    kernels: Kernels[Any, Any], device: torch.device, graph_sizes: Sequence[int] = (), *, guesses: int = 0
) -> Executor:
    """The executor for a device: a GPU's, or a CPU's with or without the C kernels.

    Args:
        kernels: as `kernels.for_device` chose them.
        device: that runs the steps.
        graph_sizes: batch sizes that get a CUDA graph; only a GPU's executor uses them.
        guesses: maximum guesses of a sequence in a step; a GPU's executor makes buffers and graphs for them.
    """
    if device.type == "cuda":
        # They bring Triton, which a CPU has no use for.
        from persimmon.kernels.fused import FusedKernels
        from persimmon.model.fused_executor import FusedExecutor

        if isinstance(kernels, FusedKernels):
            return FusedExecutor(kernels, graph_sizes, guesses=guesses)
    return NativeExecutor(kernels) if isinstance(kernels, NativeKernels) else TorchExecutor(kernels)
