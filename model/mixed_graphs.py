"""Steps of single tokens and chunks of prompts on fixed buffers, captured once as CUDA graphs and replayed.

Launched one by one, the kernels of a small step take the host longer than the GPU.  A graph serves every step of no
more tokens than it has, however they are divided among sequences.  It ends with the states of all tokens; which of them
are sampled from, and how, is the same as in steps without a graph.  Knows nothing of scheduling.
"""

from collections.abc import Sequence
from functools import partial

import torch

from persimmon.kernels.fused import FusedKernels
from persimmon.model.graphs import Graphs, Record
from persimmon.model.kv_cache import KVCache
from persimmon.model.mixed_inputs import MAX_CHUNKS, MixedBuffer, max_chunks, write_mixed
from persimmon.model.persimmon import Persimmon, Step
from persimmon.model.runner import SequenceInput
from persimmon.model.staging import Staging


class MixedGraphs:
    """Runs steps of up to max(sizes) tokens.

    Args:
        model: the network.
        cache: its keys and values.
        kernels: the operations, with their buffers reserved.
        sizes: numbers of tokens to capture.
        max_num_seqs: most sequences of a step.
        max_model_len: maximum tokens of a sequence.

    Attributes:
        graphs: one for each size; each returns the final states of its tokens, [T, hidden].
    """

    def __init__(
        self,
        model: Persimmon,
        cache: KVCache,
        kernels: FusedKernels,
        *,
        sizes: Sequence[int],
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        self._model = model
        self._cache = cache
        self._kernels = kernels
        self._configs = kernels.chunk_configs(cache.dtype)
        self.graphs = Graphs(sizes, self._run)
        max_blocks = -(-max_model_len // cache.block_size)
        make = partial(MixedBuffer, self.graphs.sizes[-1], max_num_seqs, max_blocks, self._configs)
        self._staging = Staging(make, cache.device)
        tables = MAX_CHUNKS + 1 + max_num_seqs
        self._block_tables = torch.zeros(tables, max_blocks, dtype=torch.int32, device=cache.device)

    @property
    def sizes(self) -> Sequence[int]:
        """Numbers of tokens that have a graph, in ascending order."""
        return self.graphs.sizes

    @property
    def replays(self) -> int:
        """How many steps were replays of a captured graph."""
        return self.graphs.replays

    def takes(self, batch: Sequence[SequenceInput]) -> bool:
        """Whether a step fits, and has no guesses and nothing that changes how its tokens are embedded or rotated."""
        tokens = sum(len(item.token_ids) for item in batch)
        if not self.graphs.takes(tokens):
            return False
        chunks = sum(len(item.token_ids) != 1 for item in batch)
        return chunks <= max_chunks(self.graphs.size(tokens)) and not any(
            item.patches or item.guesses or item.start < item.prompt_length - 1 for item in batch
        )

    @torch.inference_mode()
    def capture(self, size: int, record: Record) -> None:
        """Captures one size, on nothing but padding."""
        self._send((), (), size)
        self.graphs.capture(size, record)

    @torch.inference_mode()
    def launch(self, batch: Sequence[SequenceInput], rows: Sequence[int]) -> torch.Tensor:
        """Starts a step.

        Args:
            batch: a step that `takes` accepts, sequences with one token first.
            rows: the tokens whose states are wanted.

        Returns:
            [R, hidden], the final LayerNorm's output at these rows.
        """
        size = self.graphs.size(sum(len(item.token_ids) for item in batch))
        self._send(batch, rows, size)
        states = self.graphs.run(size)
        wanted = self._staging.on_device.inputs(size, self._block_tables).rows[: len(rows)]
        return states[wanted]

    def _send(self, batch: Sequence[SequenceInput], rows: Sequence[int], size: int) -> None:
        host = self._staging.host()
        tables, width = write_mixed(host, batch, rows, size, self._cache.block_size, self._configs)
        self._staging.send(host.size(tables, width))
        self._block_tables[:tables, :width].copy_(self._staging.on_device.block_tables(tables, width))

    def _run(self, size: int) -> torch.Tensor:
        inputs = self._staging.on_device.inputs(size, self._block_tables)
        decodes = self._block_tables[MAX_CHUNKS + 1 :][: len(inputs.lengths)]
        plan = self._kernels.plan_decode(inputs.live, inputs.lengths, decodes, inputs.chunks)
        sampled = self._kernels.sampled
        return self._model.forward(Step(inputs.token_ids, plan, logits_rows=None, sampled=sampled), self._cache)
