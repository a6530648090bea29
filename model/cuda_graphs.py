"""Decode steps with fixed buffers and padded batches, captured once as CUDA graphs and replayed.

A step in which every sequence has one token does the same launches whatever the tokens are, so a GPU can repeat them
without the host: there is a graph for each of a few batch sizes, and a step runs in the smallest that holds it.  Rows
beyond the batch are padding, which no live row can see.  In a step with guesses each token is a row; it has graphs of
its own.  Knows nothing of scheduling.
"""

from collections.abc import Sequence
from functools import partial

import torch

from persimmon.kernels.fused import FusedKernels
from persimmon.model.fused_sampler import draw_tokens, finish_draw, gather_of
from persimmon.model.graphs import Graphs, Record, Replayable
from persimmon.model.kv_cache import KVCache
from persimmon.model.persimmon import Persimmon, Step
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import SequenceInput, apart
from persimmon.model.sampler import Samples
from persimmon.model.staging import Staging
from persimmon.model.step_inputs import StepBuffer, needs_logits, write_draw, write_step


class DecodeGraphs:
    """Runs decode steps of up to max(sizes) sequences, and with guesses of up to max(guess_sizes) tokens.

    Without a GPU nothing is captured and each step's launches are made anew, on the same padded buffers.

    Args:
        model: the network.
        cache: its keys and values.
        kernels: the operations, with their buffers reserved.
        sizes: batch sizes to capture.
        guess_sizes: numbers of tokens of steps with guesses to capture.
        max_model_len: maximum tokens of a sequence.

    Attributes:
        graphs: one for each size.
        with_guesses: one for each of the guess sizes.
    """

    def __init__(
        self,
        model: Persimmon,
        cache: KVCache,
        kernels: FusedKernels,
        *,
        sizes: Sequence[int],
        guess_sizes: Sequence[int] = (),
        max_model_len: int,
    ) -> None:
        self._model = model
        self._cache = cache
        self._kernels = kernels
        self._draw = partial(draw_tokens, kernels, model.head, gather_of(model))
        self.graphs = Graphs(sizes, self._run)
        self.with_guesses = Graphs(guess_sizes, partial(self._run, shared=True))
        self._redraws = Graphs([*sizes, *guess_sizes], self._redraw)
        most, device = self.sizes[-1], cache.device
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
    def sizes(self) -> Sequence[int]:
        """All sizes, in ascending order."""
        return self._redraws.sizes

    @property
    def replays(self) -> int:
        """How many steps were replays of a captured graph."""
        return self.graphs.replays + self.with_guesses.replays

    def takes(self, rows: int, *, guesses: bool = False) -> bool:
        """Whether a step of `rows` sequences fits, or one of `rows` tokens of which some are guesses."""
        return (self.with_guesses if guesses else self.graphs).takes(rows)

    def graph(self, rows: int) -> Replayable | None:
        """The graph for steps of `rows` sequences; None if nothing was captured."""
        return self.graphs.graph(rows)

    @torch.inference_mode()
    def capture(self, size: int, record: Record) -> None:
        """Captures one size, on nothing but padding, so that nothing is written to the cache."""
        self._buffer.words.zero_()
        for graphs in (self.graphs, self.with_guesses, self._redraws):
            if size in graphs.sizes:
                graphs.capture(size, record)

    @torch.inference_mode()
    def launch(self, batch: Sequence[SequenceInput]) -> Samples:
        """Starts a step in which every sequence draws at each of its tokens: one, or with guesses several.

        Returns:
            The tokens, in memory that the next step overwrites.
        """
        inputs = apart(batch)
        rows = len(inputs)
        graphs = self.with_guesses if rows > len(batch) else self.graphs
        size = graphs.size(rows)
        host = self._staging.host()
        width = write_step(host, inputs, size)
        self._staging.send(host.size(rows, width))
        self._block_tables[:rows, :width].copy_(self._buffer.block_tables(rows, width))
        graphs.run(size)
        return self._finish([own for item in inputs for own in item.samplings])

    @torch.inference_mode()
    def sample(self, hidden: torch.Tensor, params: Sequence[RowSampling]) -> Samples:
        """Draws a token a row from states of another step: [R, hidden] and R settings, in the same memory."""
        rows = len(params)
        host = self._staging.host()
        write_draw(host.inputs(rows), params)
        self._staging.send(host.size(0, 0))
        inputs, logits = self._buffer.inputs(rows), self._logits[:rows]
        wanted = any(needs_logits(own) for own in params)
        self._draw(hidden, inputs, logits if wanted else None)
        return self._finish(params)

    def _finish(self, params: Sequence[RowSampling]) -> Samples:
        rows = len(params)
        if not any(needs_logits(own) for own in params):
            return Samples(self.sampled[:rows])
        redraw = partial(self._redraws.run, self._redraws.size(rows))
        return finish_draw(self._kernels, self._logits[:rows], params, redraw)

    def _run(self, size: int, *, shared: bool = False) -> None:
        inputs = self._buffer.inputs(size)
        plan = self._kernels.plan_decode(inputs.live, inputs.lengths, self._block_tables[:size], shared=shared)
        step = Step(token_ids=inputs.token_ids, attention=plan, logits_rows=None, sampled=self.sampled)
        hidden = self._model.forward(step, self._cache)
        self._draw(hidden, inputs, self._logits[:size])

    def _redraw(self, size: int) -> None:
        inputs = self._buffer.inputs(size)
        self._kernels.sample_truncated(self._logits[:size], inputs.draw, inputs.truncation, inputs.live)
