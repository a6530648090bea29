"""How the projections of decode steps are cut up, and what they take besides their operands.

Plain facts; launches nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from persimmon.kernels.layer_norm import STATISTICS_COLUMNS

SPLIT_ALIGNMENT = 128
"""Splits begin at multiples of this many input features, whatever block_k is."""

SHARED_BYTES = 112 * 1024
"""What a program's tiles may take: two programs then share a multiprocessor of sm_90 or sm_100, which has 227 KiB.

Each tile but the one in use is on its way from memory, so this is also what a program has in flight.
"""

SHARED_BYTES_ALONE = 160 * 1024
"""The same where a multiprocessor has only one program: an A100 has 163 KiB for it, later ones more."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """What a program works on.  None of it changes a bit of the result.

    Attributes:
        block_n: output features of a program.
        block_k: input features of an iteration.
        stages: iterations' tiles in flight, the ones in use included.
    """

    block_n: int
    block_k: int
    stages: int


@dataclass(frozen=True, slots=True)
class ProjectionConfig:
    """How a projection is cut up.

    Attributes:
        block_n: output features of a program, a multiple of 64.
        block_n_many: the same with 17 to 64 rows.  Every program reads the rows from the L2 cache, so there are fewer
            and wider ones: with 64 rows, programs of 64 features would read as many bytes of rows as of weights.
        block_k: input features of an iteration, 16 to 128; at most 64 from 17 rows on, 32 from 129 rows on, where
            the rows' tile grows, and 32 in float32.
        splits: ranges of input features that are summed apart; part of the result's rounding, so never chosen by the
            number of rows.
        warps: of a program.
        stages: tiles in flight, the one in use included; None for as many as fit into `SHARED_BYTES`.
        norm_in_prologue: whether up to 16 rows are normalised by every program on the way in instead of by a kernel
            of their own; the bits are the same.
    """

    block_n: int = 64
    block_n_many: int = 128
    block_k: int = 128
    splits: int = 1
    warps: int = 4
    stages: int | None = None
    norm_in_prologue: bool = True

    def __post_init__(self) -> None:
        for name in ("block_n", "block_n_many"):
            block_n = getattr(self, name)
            if block_n % STATISTICS_COLUMNS or block_n & (block_n - 1):
                raise ValueError(f"{name} must be 64, 128 or 256, not {block_n}")
        if self.block_k not in (16, 32, 64, 128):
            raise ValueError(f"block_k must be 16, 32, 64 or 128, not {self.block_k}")
        if self.splits < 1:
            raise ValueError(f"splits must be 1 or more, not {self.splits}")

    def split_features(self, in_features: int) -> int:
        """Input features of a split; the last one may have fewer."""
        share = -(-in_features // self.splits)
        return -(-share // SPLIT_ALIGNMENT) * SPLIT_ALIGNMENT

    def tiling(self, block_m: int, element_size: int, available: int) -> Tiling:
        """How a program works on `block_m` rows (16, 32, 64, 128 or 256) of numbers of `element_size` bytes.

        `available` is the shared memory that it may take.
        """
        many = block_m in (32, 64)
        block_n, shared = (self.block_n_many, SHARED_BYTES_ALONE) if many else (self.block_n, SHARED_BYTES)
        block_k = min(self.block_k, {16: 128, 256: 32}.get(block_m, 64), 128 if element_size == 2 else 32)
        fit = min(shared, available) // ((block_n + block_m) * block_k * element_size)
        return Tiling(block_n, block_k, fit if self.stages is None else min(self.stages, fit))


WIDE = ProjectionConfig()
"""For outputs of 12,288 and 16,384 features: enough programs without splits."""

ATTENTION_OUT = ProjectionConfig(splits=4)
"""For 4096 to 4096 features."""

MLP_DOWN = ProjectionConfig(splits=4)
"""For 16,384 to 4096 features."""


@dataclass(frozen=True, slots=True)
class Norm:
    """The LayerNorm before a projection.

    Attributes:
        statistics: [2, tiles, M] float32 of the rows that come in.
        weight, bias: [in]; in float32 they are fetched ahead in the prologue.
        eps: added to the variance.
    """

    statistics: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Workspace:
    """Memory in which the splits of a projection meet; any number of projections use it one after the other.

    Attributes:
        partials: float32, at least splits * M * out.
        counters: int32, one for each tile of output features; zero between launches.
    """

    partials: torch.Tensor
    counters: torch.Tensor

    def check(self, splits: int, rows: int, out_features: int, counters: int) -> None:
        """Makes sure that there is room for the splits of a [rows, out_features] result, and for their counters.

        Raises:
            ValueError: there is not.
        """
        needed = splits * rows * out_features
        if self.partials.numel() < needed or self.counters.numel() < counters:
            raise ValueError(
                f"the workspace has {self.partials.numel()} partials and {self.counters.numel()} counters, "
                f"{splits} splits of [{rows}, {out_features}] need {needed} and {counters}"
            )

    @staticmethod
    def sizes(projections: Iterable[tuple[int, ProjectionConfig]], max_rows: int) -> tuple[int, int]:
        """Elements of partials and of counters for projections to a number of output features."""
        partials = counters = 0
        for out_features, config in projections:
            partials = max(partials, config.splits * max_rows * out_features)
            counters = max(counters, -(-out_features // min(config.block_n, config.block_n_many)))
        return partials, counters

    @classmethod
    def bytes(cls, projections: Iterable[tuple[int, ProjectionConfig]], max_rows: int) -> int:
        """What `allocate` takes."""
        return 4 * sum(cls.sizes(projections, max_rows))

    @classmethod
    def allocate(
        cls, projections: Iterable[tuple[int, ProjectionConfig]], max_rows: int, device: torch.device
    ) -> "Workspace":
        """Enough for each of these (output features, config) with up to `max_rows` rows."""
        partials, counters = cls.sizes(projections, max_rows)
        return cls(
            torch.empty(partials, dtype=torch.float32, device=device),
            torch.zeros(counters, dtype=torch.int32, device=device),
        )
