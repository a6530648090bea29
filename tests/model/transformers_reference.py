"""What Transformers' PersimmonForCausalLM makes of prompts: the truth that the network is compared with.

Knows nothing of the server's own code.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

NEAR_TIE = 1e-3
"""Two logits this close could change places by rounding, and with them all tokens that follow."""


@dataclass(frozen=True)
class GreedyReference:
    """Greedy continuations, end-of-text ignored.

    Attributes:
        prompts: token ids.
        outputs: the tokens after each prompt.
        logits: for each prompt [len(prompt) + len(output), vocab_size] float32, each token's next-token logits.
    """

    prompts: Sequence[list[int]]
    outputs: Sequence[list[int]]
    logits: Sequence[torch.Tensor]

    def token_ids(self, index: int) -> list[int]:
        """Prompt and output."""
        return self.prompts[index] + self.outputs[index]

    def without_near_ties(self) -> "GreedyReference":
        """The prompts on which the model is sure of each token, so that rounding cannot choose between two."""
        sure = [
            index
            for index, (prompt, rows) in enumerate(zip(self.prompts, self.logits, strict=True))
            if bool((_gaps(rows[len(prompt) - 1 : -1]) > NEAR_TIE).all())
        ]
        return self.select(sure)

    def select(self, indices: Iterable[int]) -> "GreedyReference":
        """Some of the prompts."""
        chosen = list(indices)
        return GreedyReference(
            [self.prompts[index] for index in chosen],
            [self.outputs[index] for index in chosen],
            [self.logits[index] for index in chosen],
        )


def _gaps(logits: torch.Tensor) -> torch.Tensor:
    best = logits.topk(2).values
    return best[:, 0] - best[:, 1]


def load(folder: Path) -> Any:
    """The checkpoint as a PersimmonForCausalLM in float32."""
    from transformers import PersimmonForCausalLM  # takes seconds; few tests need it

    model = PersimmonForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def logits(model: Any, token_ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """One pass over sequences of equal length: [sequences, length, vocab_size] float32."""
    with torch.inference_mode():
        result: torch.Tensor = model(torch.tensor(token_ids)).logits
    return result


def continue_greedily(model: Any, prompts: Sequence[list[int]], new_tokens: int) -> GreedyReference:
    """The reference for these prompts; those of equal length run together, so that there is no padding."""
    outputs: dict[int, list[int]] = {}
    rows: dict[int, torch.Tensor] = {}
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for length, group in groupby(by_length, key=lambda index: len(prompts[index])):
        members = list(group)
        with torch.inference_mode():
            generated = model.generate(
                torch.tensor([prompts[index] for index in members]), do_sample=False, max_new_tokens=new_tokens
            ).tolist()
        for index, token_ids, row in zip(members, generated, logits(model, generated), strict=True):
            outputs[index] = token_ids[length:]
            rows[index] = row
    order = range(len(prompts))
    return GreedyReference(prompts, [outputs[index] for index in order], [rows[index] for index in order])
