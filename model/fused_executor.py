"""Steps on a GPU: the fused kernels launched one by one, and decode steps as CUDA graphs.  Brings Triton."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import ClassVar, Self

import torch

from persimmon.kernels import StepLimits
from persimmon.kernels.fused import SMALL_STEP, FusedKernels, FusedPlan
from persimmon.model.config import PersimmonConfig
from persimmon.model.cuda_graphs import DecodeGraphs
from persimmon.model.executor import Executor
from persimmon.model.fused_sampler import FusedSampler, gather_of
from persimmon.model.graph_sizes import graph_bytes, guess_sizes, mixed_sizes
from persimmon.model.graphs import GraphRecorder, Record, capture_all
from persimmon.model.host_copy import pack, unpack
from persimmon.model.kv_cache import KVCache
from persimmon.model.mixed_graphs import MixedGraphs
from persimmon.model.persimmon import Persimmon, Step
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import SequenceInput, apart
from persimmon.model.sampler import Samples


class FusedExecutor(Executor):
    """A GPU; or, in tests, a device where Triton interprets or compiles only, and nothing is captured.

    Args:
        kernels: the operations.
        graph_sizes: batch sizes of decode steps that get a CUDA graph; none for a classifier, which decodes nothing.
        mixed_sizes: token counts of steps with prompts that get a CUDA graph, if decode steps do; by default
            `graph_sizes.mixed_sizes`.
        guesses: maximum guesses of a sequence in a step.

    Attributes:
        graphs: runs decode steps up to the largest size, from `start` on; None where there are no sizes.
        mixed: the same for steps with prompts.
    """

    # It computes while the host plans.
    overlaps: ClassVar[bool] = True
    compiles: ClassVar[bool] = True
    kernels: FusedKernels

    def __init__(
        self,
        kernels: FusedKernels,
        graph_sizes: Sequence[int] = (),
        mixed_sizes: Sequence[int] | None = None,
        *,
        guesses: int = 0,
    ) -> None:
        super().__init__(kernels)
        self.graphs: DecodeGraphs | None = None
        self.mixed: MixedGraphs | None = None
        self._graph_sizes = list(graph_sizes)
        self._mixed_sizes = mixed_sizes
        self._guesses = guesses
        self._sampler: FusedSampler | None = None
        self._limits: StepLimits | None = None

    @property
    def name(self) -> str:
        """The GPU, for people."""
        device = self.kernels.device
        return f"{device} ({torch.cuda.get_device_name(device)})"

    @property
    def preparation(self) -> str | None:
        """Capturing graphs."""
        return "CUDA graphs" if self._graph_sizes else None

    @property
    def max_guess_rows(self) -> int:
        """Up to `SMALL_STEP` tokens a row has the bits that it has alone; 0 before `reserve`."""
        return 0 if self._limits is None else self._guess_rows(self._limits)

    def step_buffers(self, config: PersimmonConfig, dtype: torch.dtype, limits: StepLimits) -> int:
        """What kernels share, and graphs."""
        with_guesses = self._sizes_with_guesses(limits)
        graphs = graph_bytes(config, dtype, self._graph_sizes, self._sizes_with_prompts(limits), with_guesses)
        return super().step_buffers(config, dtype, self._by_row(limits)) + graphs

    def reserve(self, limits: StepLimits) -> None:
        """Makes the buffers that steps within these limits share."""
        super().reserve(self._by_row(limits))
        self._limits = limits

    def start(
        self, model: Persimmon, cache: KVCache, progress: Callable[[Sequence[int]], Iterable[int]] = iter
    ) -> Self:
        """Captures the graphs."""
        super().start(model, cache, progress)
        self._sampled = torch.zeros(0, dtype=torch.int64, device=cache.device)
        if model.config.generates:
            self._sampler = FusedSampler(
                kernels=self.kernels,
                head=model.head,
                vocab_size=model.config.vocab_size,
                gather=gather_of(model),
            )
        if self._graph_sizes and self._limits is not None:
            longest, most = self._limits.max_model_len, self._limits.max_num_seqs
            self.graphs = DecodeGraphs(
                model,
                cache,
                self.kernels,
                sizes=self._graph_sizes,
                guess_sizes=self._sizes_with_guesses(self._limits),
                max_model_len=longest,
            )
            if sizes := self._sizes_with_prompts(self._limits):
                self.mixed = MixedGraphs(
                    model, cache, self.kernels, sizes=sizes, max_num_seqs=most, max_model_len=longest
                )
            record = self.recorder()
            if record is not None:
                capture_all([own for own in (self.mixed, self.graphs) if own is not None], record, progress)
        return self

    def recorder(self) -> Record | None:
        """What captures graphs; None where nothing can, and each step's launches are made anew."""
        return GraphRecorder() if self.kernels.device.type == "cuda" else None

    def plan(self, batch: Sequence[SequenceInput]) -> FusedPlan:
        """As `Executor.plan`: a sequence with guesses is as many rows as it has tokens, each decoded as if alone."""
        rows = apart(batch)
        plan: FusedPlan = super().plan(rows)
        return replace(plan, shared=len(rows) > len(batch))

    def forward(self, step: Step) -> torch.Tensor:
        """Launch by launch."""
        return self.model.forward(step, self.cache)

    def sample(self, hidden: torch.Tensor, params: Sequence[RowSampling]) -> Samples:
        """In the epilogue of lm_head.

        Raises:
            ValueError: the network classifies.
        """
        if self._sampler is None:
            raise ValueError(f"{self.model.config.architecture} draws no tokens")
        if self.graphs is not None and self.graphs.takes(len(params)):
            return self.graphs.sample(hidden, params)
        return self._sampler(hidden, params)

    def decode(self, batch: Sequence[SequenceInput]) -> Samples | None:
        """On fixed buffers where every sequence draws at each of its tokens, up to the largest size."""
        if self.graphs is None or not _is_decode(batch):
            return None
        rows = sum(len(item.token_ids) for item in batch)
        if not self.graphs.takes(rows, guesses=rows > len(batch)):
            return None
        return self.graphs.launch(batch)

    def states(self, batch: Sequence[SequenceInput], rows: Sequence[int]) -> torch.Tensor | None:
        """On fixed buffers where a step has few tokens, each with the embedding and the angles of its place."""
        if self.mixed is None or not self.mixed.takes(batch):
            return None
        return self.mixed.launch(batch, rows)

    @property
    def replays(self) -> int:
        """How many steps were CUDA graphs."""
        return sum(own.replays for own in (self.graphs, self.mixed) if own is not None)

    @property
    def sampled(self) -> torch.Tensor:
        """[*] int64; graphs read them where the kernels leave them."""
        return self._sampled if self.graphs is None else self.graphs.sampled

    def keep(self, tokens: torch.Tensor) -> None:
        """Leaves a step's tokens where the next finds them."""
        if self.graphs is None:
            self._sampled = tokens
        else:
            self.graphs.sampled[: len(tokens)] = tokens

    def fetch(self, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.cuda.Event | None]:
        """One copy of all of them into pinned memory, under way."""
        if tensors[0].device.type == "cpu":
            return super().fetch(tensors)
        on_host, copied = self._send(pack(tensors))
        return unpack(on_host, tensors), copied

    def _send(self, words: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        on_host = torch.empty(words.shape, dtype=words.dtype, pin_memory=True)
        # With an event even where there is nothing to copy: by waiting for it the scheduler learns what a chunk takes.
        on_host.copy_(words, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        return on_host, copied

    def _guess_rows(self, limits: StepLimits) -> int:
        return min(SMALL_STEP, limits.max_num_seqs * (1 + self._guesses)) if self._guesses else 0

    def _by_row(self, limits: StepLimits) -> StepLimits:
        """With every guess counted as a sequence, which it is for the kernels."""
        return replace(limits, max_num_seqs=max(limits.max_num_seqs, self._guess_rows(limits)))

    def _sizes_with_guesses(self, limits: StepLimits) -> Sequence[int]:
        return guess_sizes(self._guess_rows(limits)) if self._graph_sizes else ()

    def _sizes_with_prompts(self, limits: StepLimits) -> Sequence[int]:
        if not self._graph_sizes:
            return ()
        return mixed_sizes(limits.max_num_batched_tokens) if self._mixed_sizes is None else self._mixed_sizes


def _is_decode(batch: Sequence[SequenceInput]) -> bool:
    return all(
        len(item.token_ids) == len(item.samplings) == 1 + item.guesses and item.report is None and not item.patches
        for item in batch
    )
