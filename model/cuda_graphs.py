"""Decode steps with fixed buffers and padded batches, captured once as CUDA graphs and replayed.

A step in which every sequence has one token does the same launches whatever the tokens are, so a GPU can repeat them
without the host: there is a graph for each of a few batch sizes, and a step runs in the smallest that holds it.  Rows
beyond the batch are padding, which no live row can see.  Knows nothing of scheduling.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from persimmon.kernels.fused import FusedKernels
from persimmon.model.fused_sampler import finish_draw
from persimmon.model.kv_cache import KVCache
from persimmon.model.persimmon import Persimmon, Step
from persimmon.model.runner import SequenceInput
from persimmon.model.sampler import Samples
from persimmon.model.staging import Staging
from persimmon.model.step_inputs import StepBuffer, StepInputs, needs_logits, write_step


class DecodeGraphs:
    """Runs decode steps of up to max(sizes) sequences.

    Without a GPU nothing is captured and each step's launches are made anew, on the same padded buffers.

    Args:
        model: the network.
        cache: its keys and values.
        kernels: the operations, with their buffers reserved.
        sizes: batch sizes to capture.
        max_model_len: maximum tokens of a sequence.
    """

    def __init__(
        self,
        model: Persimmon,
        cache: KVCache,
        kernels: FusedKernels,
        *,
        sizes: Sequence[int],
        max_model_len: int,
    ) -> None:
        self._model = model
        self._cache = cache
        self._kernels = kernels
        self._sizes = sorted(set(sizes))
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._replays = 0
        most, device = self._sizes[-1], cache.device
        max_blocks = -(-max_model_len // cache.block_size)
        self._staging = Staging(partial(StepBuffer, most, max_blocks), device)
        self._buffer = self._staging.on_device
        # Graphs hold its width, so it has that of the longest sequence; what travels is as wide as the step needs.
        self._block_tables = torch.zeros(most, max_blocks, dtype=torch.int32, device=device)
        self._logits = torch.zeros(most, model.config.vocab_size, dtype=torch.float32, device=device)

    @property
    def sampled(self) -> torch.Tensor:
        """[max_num_seqs] int64, the tokens of the last step."""
        return self._kernels.sampled

    @property
    def replays(self) -> int:
        """How many steps were replays of a captured graph."""
        return self._replays

    def takes(self, rows: int) -> bool:
        """Whether a step of `rows` sequences fits."""
        return rows <= self._sizes[-1]

    def graph(self, rows: int) -> torch.cuda.CUDAGraph | None:
        """The graph for steps of `rows` sequences; None if nothing was captured."""
        return self._graphs.get(self._size(rows))

    @torch.inference_mode()
    def capture(self, progress: Callable[[Sequence[int]], Iterable[int]] = iter) -> None:
        """Captures a graph of each size, the largest first, so that the others fit into its memory.

        Args:
            progress: wraps the sizes, to show how far it is.
        """
        pool = torch.cuda.graph_pool_handle()
        for size in progress(self._sizes[::-1]):
            # All rows are padding here, so nothing is written to the cache.  The first run compiles the kernels.
            self._buffer.words.zero_()
            self._run(self._buffer.inputs(size))
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._run(self._buffer.inputs(size))
            self._graphs[size] = graph

    @torch.inference_mode()
    def launch(self, batch: Sequence[SequenceInput]) -> Samples:
        """Starts a step in which every sequence has one token and samples once.

        Returns:
            The tokens, in memory that the next step overwrites.
        """
        size = self._size(len(batch))
        self._send(batch, size)
        graph = self._graphs.get(size)
        if graph is not None:
            graph.replay()
            self._replays += 1
        else:
            self._run(self._buffer.inputs(size))
        params = [own for item in batch for own in item.samplings]
        if not any(needs_logits(own) for own in params):
            return Samples(self.sampled[: len(batch)])
        return finish_draw(self._kernels, self._logits[: len(batch)], self._buffer.inputs(len(batch)), params)

    def _size(self, rows: int) -> int:
        return next(size for size in self._sizes if size >= rows)

    def _send(self, batch: Sequence[SequenceInput], size: int) -> None:
        rows = len(batch)
        host = self._staging.host()
        width = write_step(host, batch, size)
        self._staging.send(host.size(rows, width))
        self._block_tables[:rows, :width].copy_(self._buffer.block_tables(rows, width))

    def _run(self, inputs: StepInputs) -> None:
        rows = len(inputs.lengths)
        plan = self._kernels.plan_decode(inputs.live, inputs.lengths, self._block_tables[:rows])
        step = Step(token_ids=inputs.token_ids, attention=plan, logits_rows=None, sampled=self.sampled)
        hidden = self._model.forward(step, self._cache)
        self._kernels.sample(hidden, self._model.head, inputs.draw, inputs.live, self._logits[:rows])
