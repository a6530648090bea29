"""Which part of a network each of several ranks holds: heads, columns of the MLP, and rows of the vocabulary.

Knows names and shapes, no numbers.  A single rank holds all of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from persimmon.model.config import PersimmonConfig
from persimmon.model.errors import CheckpointError
from persimmon.model.leftovers import EMBEDDING, HEAD


@dataclass(frozen=True, slots=True)
class Part:
    """The rows and columns of a parameter that a rank holds; None for all of them."""

    rows: range | None = None
    columns: range | None = None

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of the part, where the parameter has the shape `whole`."""
        rows = whole[0] if self.rows is None else len(self.rows)
        return (rows, *whole[1:]) if self.columns is None else (rows, len(self.columns))


WHOLE = Part()


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `size` parts of a network.

    Attention heads, the MLP's inner values and the vocabulary are divided.  Norms and a classifier's score are on
    every rank.  Of the products that are summed over ranks, only the first rank has the bias.

    Attributes:
        rank: which part, from 0.
        size: the number of ranks; it divides the heads and `intermediate_size`, see `check_divides`.
    """

    rank: int = 0
    size: int = 1

    def num_heads(self, config: PersimmonConfig) -> int:
        """Attention heads of this rank."""
        return config.num_attention_heads // self.size

    def intermediate_size(self, config: PersimmonConfig) -> int:
        """Inner values of the MLP that this rank computes."""
        return config.intermediate_size // self.size

    def vocabulary(self, config: PersimmonConfig, rank: int | None = None) -> range:
        """The rows of the embedding and lm_head that a rank holds, this one by default; the first ranks have most."""
        rank = self.rank if rank is None else rank
        each, more = divmod(config.vocab_size, self.size)
        start = rank * each + min(rank, more)
        return range(start, start + each + (rank < more))

    def part(self, name: str, shape: tuple[int, ...], config: PersimmonConfig) -> Part | None:
        """What this rank holds of a parameter; None for nothing.

        Args:
            name: of the parameter, as Hugging Face has it.
            shape: of all of it.
            config: the network.
        """
        if self.size == 1:
            return WHOLE
        if name in (EMBEDDING, HEAD):
            return Part(rows=self.vocabulary(config))
        module, _, kind = name.rpartition(".")
        if module.endswith(("self_attn.query_key_value", "mlp.dense_h_to_4h")):
            # Those of query_key_value are ordered by head.
            return Part(rows=self._equal_part(shape[0]))
        if module.endswith(("self_attn.dense", "mlp.dense_4h_to_h")):
            if kind == "weight":
                return Part(columns=self._equal_part(shape[1]))
            return WHOLE if self.rank == 0 else None
        return WHOLE

    def _equal_part(self, count: int) -> range:
        each = count // self.size
        return range(self.rank * each, (self.rank + 1) * each)


ONLY = Shard()
"""The network as a single rank has it."""


def check_divides(config: PersimmonConfig, size: int) -> None:
    """Checks that a network can be divided among this number of ranks.

    Raises:
        CheckpointError: it cannot.
    """
    heads, inner = config.num_attention_heads, config.intermediate_size
    if heads % size or inner % size:
        common = math.gcd(heads, inner)
        allowed = [str(count) for count in range(1, common + 1) if common % count == 0]
        raise CheckpointError(
            f"--tensor-parallel-size is {size}, which does not divide this model's {heads} attention heads and the "
            f"MLP's {inner} inner values; expected {' or '.join(allowed)}"
        )


def check_groups(
    formats: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]], config: PersimmonConfig, size: int
) -> None:
    """Checks that no group of inputs that share a scale would lie on two ranks.

    Args:
        formats: a `QuantizedFormat` by the name of each matrix that is quantized; others are ignored.
        shapes: of the whole network's parameters, by name.
        config: the network.
        size: the number of ranks.

    Raises:
        CheckpointError: one would.
    """
    for name, form in formats.items():
        part = Shard(0, size).part(name, shapes[name], config)
        # Two numbers of 4 bits share a byte.
        group_size = getattr(form, "group_size", None) or (2 if getattr(form, "bits", 8) == 4 else 1)
        if part is not None and part.columns is not None and len(part.columns) % group_size:
            raise CheckpointError(
                f"--tensor-parallel-size is {size}, which leaves each rank {len(part.columns)} inputs of {name}; "
                f"groups of {group_size} do not divide them: use fewer ranks, or smaller groups"
            )
