"""Log-probabilities of tokens under the network's own logits, and of the most probable tokens at the same positions.

Computed on the device where the logits are; a `LogprobRows` stays there until the runner copies it to the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from persimmon.model.token_logprobs import TokenLogprobs


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """What is reported of R rows of logits.

    Attributes:
        token_ids: [R] int64, a token of each row.
        logprobs: [R] float32, their natural log-probabilities.
        top_ids: [R, K] int64, each row's most probable tokens, best first; fewer than K may be wanted of a row.
        top_logprobs: [R, K] float32.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, token_ids: torch.Tensor, top: int) -> "LogprobRows":
        """Reads them off the logits.

        Args:
            logits: [R, vocab_size] float32.
            token_ids: [R] int64.
            top: K, at most vocab_size.
        """
        total = logits.logsumexp(-1)
        logprobs = logits.gather(1, token_ids[:, None])[:, 0] - total
        if top == 0:
            return cls(
                token_ids=token_ids,
                logprobs=logprobs,
                top_ids=token_ids.new_empty(len(logits), 0),
                top_logprobs=logits.new_empty(len(logits), 0),
            )
        values, ids = logits.topk(top, dim=-1)
        # topk promises no order among equals: by id, then by value, keeping that order.
        ids, order = ids.sort(dim=-1)
        values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
        return cls(
            token_ids=token_ids, logprobs=logprobs, top_ids=ids.gather(1, order), top_logprobs=values - total[:, None]
        )

    @classmethod
    def concatenate(cls, parts: Sequence["LogprobRows"]) -> "LogprobRows":
        """The rows of several, which have the same K, one after the other."""
        return cls(
            token_ids=torch.cat([part.token_ids for part in parts]),
            logprobs=torch.cat([part.logprobs for part in parts]),
            top_ids=torch.cat([part.top_ids for part in parts]),
            top_logprobs=torch.cat([part.top_logprobs for part in parts]),
        )

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of it, to be moved: `LogprobRows(*tensors)` is the same rows."""
        return self.token_ids, self.logprobs, self.top_ids, self.top_logprobs

    def fetch(self, tops: Sequence[int]) -> list[TokenLogprobs]:
        """The rows as plain data, each with as many tokens as it asked for; those on a device are waited for."""
        token_ids, logprobs = self.token_ids.tolist(), self.logprobs.tolist()
        ids, values = self.top_ids.tolist(), self.top_logprobs.tolist()
        return [
            TokenLogprobs(
                token_id=token_ids[row], logprob=logprobs[row], top_ids=ids[row][:top], top_logprobs=values[row][:top]
            )
            for row, top in enumerate(tops)
        ]
