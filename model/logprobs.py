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
        total = log_totals(logits)
        logprobs = logits.gather(1, token_ids[:, None])[:, 0] - total
        if top == 0:
            return cls(
                token_ids=token_ids,
                logprobs=logprobs,
                top_ids=token_ids.new_empty(len(logits), 0),
                top_logprobs=logits.new_empty(len(logits), 0),
            )
        values, ids = _highest(logits, top)
        return cls(token_ids=token_ids, logprobs=logprobs, top_ids=ids, top_logprobs=values - total[:, None])

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


def log_totals(logits: torch.Tensor) -> torch.Tensor:
    """[R] log(sum(exp(logits))), each with the same bits whatever R is.

    On a CPU torch sums each of several rows in one thread, but a single one in all of them, so that one is doubled.  On
    a GPU the order of its sums depends on R.
    """
    if logits.device.type != "cpu":
        return log_totals_by_halves(logits)
    return logits.logsumexp(-1) if len(logits) != 1 else torch.cat((logits, logits)).logsumexp(-1)[:1]


def log_totals_by_halves(logits: torch.Tensor) -> torch.Tensor:
    """`log_totals` by elementwise operations: halves are added until one column is left."""
    highest = logits.amax(-1)
    x = (logits - highest[:, None]).exp_()
    width = x.shape[1]
    while width > 1:
        half = width // 2
        x[:, :half] += x[:, width - half : width]
        width -= half
    return highest + x[:, 0].log()


def _highest(logits: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, top] highest logits, best first, and their ids; of equal ones those with the lowest ids, in their order.

    topk promises no order among equals, nor which of them it takes, so that K would decide on the last ones.
    """
    values, ids = logits.topk(top, dim=-1)
    lowest = values[:, -1:]
    ties = logits == lowest
    # On a GPU the comparison would wait for everything launched before it.
    if logits.device.type != "cpu" or ties.sum() > (values == lowest).sum():
        numbers = torch.arange(logits.shape[1], dtype=torch.float32, device=logits.device)
        first_ties = torch.where(ties, -numbers, float("-inf")).topk(top, dim=-1).indices
        place = torch.arange(top, device=logits.device) - (values > lowest).sum(-1, keepdim=True)
        ids = torch.where(place >= 0, first_ties.gather(1, place.clamp_min(0)), ids)
    # By id, then by value, keeping that order.
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)
