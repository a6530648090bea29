"""Runs the steps of ranks other than the first: their part of the network and of logits, and nothing beyond.

Only the first rank draws and reports.  Knows nothing of how steps come here.
"""

from collections.abc import Sequence

import torch

from persimmon.model.executor import Executor
from persimmon.model.logprobs import LogprobRows
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import PromptLogprobs, Runner
from persimmon.model.sampler import Samples, rows_at_once


class FollowingRunner(Runner):
    """A `Runner` whose tokens and reports mean nothing.

    It exchanges with the other ranks what a `Runner` of the first rank exchanges for the same step, in the same order.

    Args:
        executor: runs this rank's steps, started.
    """

    def __init__(self, executor: Executor) -> None:
        super().__init__(executor)
        self._sampler = self._send_logits

    def _send_logits(self, hidden: torch.Tensor, params: Sequence[RowSampling]) -> Samples:
        self._model.logits(hidden)
        return Samples(torch.zeros(len(params), dtype=torch.int64, device=hidden.device))

    def _logprobs(self, states: torch.Tensor, report: PromptLogprobs) -> LogprobRows:
        for some in torch.split(states, rows_at_once(self._model.config.vocab_size)):
            self._model.logits(some)
        nothing = states.new_zeros(0)
        return LogprobRows(token_ids=nothing, logprobs=nothing, top_ids=nothing, top_logprobs=nothing)
