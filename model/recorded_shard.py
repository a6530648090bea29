"""One rank's part of the network as programs of native kernels, between which it sums over the ranks.

As `recorded_network`, but a call runs only up to the next sum.  Knows nothing of sampling.
"""

import torch

from persimmon.kernels.cpu.native import PRODUCT_BUFFER, RESIDUAL_BUFFER, NativeKernels, NativePlan, step_of_plan
from persimmon.model.config import PersimmonConfig
from persimmon.model.kv_cache import KVCache
from persimmon.model.persimmon import Persimmon, Step
from persimmon.model.ranks import Ranks
from persimmon.model.recorded_network import embeds, grown, width_of_layers
from persimmon.model.shard import Shard


class RecordedShard:
    """Runs `Persimmon.forward` on one rank and one cache.

    Args:
        model: this rank's part of the network, prepared for `kernels`.
        ranks: the ranks that share it.
        cache: the keys and values of this rank's heads.
        kernels: record it.
        max_tokens: of a step; a larger one makes the buffers grow.
    """

    def __init__(
        self, model: Persimmon, ranks: Ranks, cache: KVCache, kernels: NativeKernels, max_tokens: int = 64
    ) -> None:
        self._model = model
        self._ranks = ranks
        self._cache = cache
        self._kernels = kernels
        self._record(max_tokens)

    @torch.inference_mode()
    def forward(self, step: Step) -> torch.Tensor:
        """As `Persimmon.forward`."""
        plan, tokens = step.attention, step.attention.num_tokens
        if tokens > self._max_tokens:
            self._record(grown(tokens))
        rows = tokens if step.logits_rows is None else len(step.logits_rows)
        hidden = torch.empty(rows, self._model.config.hidden_size)
        token_ids, elsewhere = self._model.rows_of_table(step.token_ids, step.sampled, self._ranks)
        native_step = step_of_plan(plan, step.rotary, token_ids=token_ids, rows=step.logits_rows, hidden=hidden)
        x, product = self._x[:tokens], self._product[:tokens]
        self._embedding.run(native_step)
        x.copy_(self._ranks.sum(x.masked_fill_(elsewhere, 0)))
        if step.patches is not None:
            self._model.place_patches(x, step.patches)
        for up_to_a_product in self._layers:
            up_to_a_product.run(native_step)
            x += self._ranks.sum(product)
        self._final_norm.run(native_step)
        return hidden

    @torch.inference_mode()
    def _record(self, max_tokens: int) -> None:
        token_ids = torch.zeros(max_tokens, dtype=torch.int64)  # as many as the buffers have rows

        def forward(recorder: NativeKernels, plan: NativePlan) -> None:
            self._model.forward(Step(token_ids, plan, None), self._cache, recorder, _NoOthers(self._ranks.shard))

        program = self._kernels.record(max_tokens, forward, width_of_layers(self._model))
        first, *others, self._final_norm = program.parts()
        self._embedding = first.part(embeds)
        self._layers = [first.part(lambda operation: not embeds(operation)), *others]
        width = self._model.config.hidden_size
        self._x, self._product = (program.buffer(name, width) for name in (RESIDUAL_BUFFER, PRODUCT_BUFFER))
        self._max_tokens = max_tokens


class _NoOthers:
    """Stands for the ranks while a network is recorded: nothing has numbers yet that could be summed."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        return part

    def gather(self, part: torch.Tensor, config: PersimmonConfig) -> torch.Tensor:
        del config
        return part

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor
