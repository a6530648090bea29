"""How a decode step's attention is divided: the splits of its sequences, their list, and where they leave results.

Knows lengths, not keys and values.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from persimmon.kernels.launch import Limits, launch_options, next_power_of_2

SPLIT_TOKENS = 256
"""Tokens of one work item.

Splits begin at multiples of it whatever else runs, so how a sequence's sums are grouped, and with it every bit of its
output, depends only on its own length.
"""

LIMITS = {
    "_build_work_list": Limits(registers=48, shared_bytes=1024),
}

_SPLITS_AT_ONCE = 4
"""Splits of a sequence whose places are counted together."""


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """The work list of a step, and what the programs of one launch tell each other; all layers share it.

    Attributes:
        num_items: [1] int32, how many items the step has.
        item_sequences, item_splits: [I] int32, which split of which sequence each item is, in any order.
        first_splits: [M] int32, how many splits the sequences before each one have together.
        partial_outputs: [I * H, D] float32, each split's sum of exp2(score - maximum) * v; row
            first_split * H + head * splits + split.
        partial_maxima, partial_totals: [I * H] float32, its maximum and its sum of exp2(score - maximum).
        arrivals: [M, H] int32, how many of a sequence's splits are done; zero between launches.
        num_rows: [1] int32, how many sequences the step has, those of length zero included.

    M is the most sequences, I the most items: M * ceil(max_length / SPLIT_TOKENS).
    """

    num_items: torch.Tensor
    item_sequences: torch.Tensor
    item_splits: torch.Tensor
    first_splits: torch.Tensor
    partial_outputs: torch.Tensor
    partial_maxima: torch.Tensor
    partial_totals: torch.Tensor
    arrivals: torch.Tensor
    num_rows: torch.Tensor

    @classmethod
    def allocate(
        cls, max_sequences: int, max_length: int, num_heads: int, head_dim: int, device: torch.device
    ) -> "DecodeWorkspace":
        """Room for any step of at most `max_sequences` sequences of at most `max_length` tokens each."""
        items = max_sequences * triton.cdiv(max_length, SPLIT_TOKENS)
        rows = items * num_heads

        def int32(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        def float32(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        return cls(
            num_items=int32(1),
            item_sequences=int32(items),
            item_splits=int32(items),
            first_splits=int32(max_sequences),
            partial_outputs=float32(rows, head_dim),
            partial_maxima=float32(rows),
            partial_totals=float32(rows),
            arrivals=int32(max_sequences, num_heads),
            num_rows=int32(1),
        )

    @classmethod
    def bytes(cls, max_sequences: int, max_length: int, num_heads: int, head_dim: int) -> int:
        """Size of what `allocate` makes: about 4 * (D + 2) * H bytes for every 256 tokens of every sequence."""
        workspace = cls.allocate(max_sequences, max_length, num_heads, head_dim, torch.device("meta"))
        return sum(tensor.nbytes for tensor in (*workspace.tensors, workspace.num_rows))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What attention takes, in its order."""
        return tuple(getattr(self, name) for name in self.__slots__ if name != "num_rows")

    @property
    def max_sequences(self) -> int:
        """Most sequences of a step."""
        return self.arrivals.shape[0]

    @property
    def max_splits(self) -> int:
        """Most splits of a sequence."""
        return self.item_sequences.shape[0] // self.max_sequences


@triton.jit(do_not_specialize=["num_sequences"])
def _build_work_list(
    lengths,
    num_sequences,
    num_items,
    item_sequences,
    item_splits,
    first_splits,
    num_rows,
    MAX_SEQUENCES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program b writes the items of sequence b: see `build_work_list`."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    this = tl.program_id(0)
    others = tl.arange(0, MAX_SEQUENCES)
    length = tl.load(lengths + others, mask=others < num_sequences, other=0)
    full, tail = length // SPLIT, length % SPLIT
    own = tl.load(lengths + this)
    own_full, own_tail = own // SPLIT, own % SPLIT
    before = others < this
    total_full = tl.sum(full, 0)

    tl.store(first_splits + this, tl.sum(tl.where(before, full + (tail > 0).to(tl.int32), 0), 0))
    for first in range(0, own_full, AT_ONCE):
        split = first + tl.arange(0, AT_ONCE)
        earlier = tl.minimum(full[:, None], split[None, :])
        beside = before[:, None] & (full[:, None] > split[None, :])
        place = tl.sum(earlier + beside.to(tl.int32), 0)
        tl.store(item_sequences + place, this, mask=split < own_full)
        tl.store(item_splits + place, split, mask=split < own_full)
    ahead = (tail > own_tail) | ((tail == own_tail) & before)
    place = total_full + tl.sum(ahead.to(tl.int32), 0)
    tl.store(item_sequences + place, this, mask=own_tail > 0)
    tl.store(item_splits + place, own_full, mask=own_tail > 0)
    tl.store(num_items, total_full + tl.sum((tail > 0).to(tl.int32), 0), mask=this == 0)
    tl.store(num_rows, num_sequences, mask=this == 0)


def build_work_list(lengths: torch.Tensor, workspace: DecodeWorkspace, *, pdl: bool = False) -> None:
    """Turns a step's lengths into its items: one for each SPLIT_TOKENS tokens, begun or full, of each sequence.

    Full splits come first and the shorter last ones after them, longest first, so that the programs that share the
    items end at about the same time.  Of the full ones, the first splits of all sequences come before all second ones:
    sequences that share blocks, and rows of one sequence, read them at about the same time, the first from memory and
    the others from the L2 cache.  Nothing but speed depends on the order.

    Reads 4 * B bytes in each of B programs; writes 8 bytes an item and 4 * B + 8.

    Args:
        lengths: [B] int32, tokens of each sequence including this step's; zero where the row is padding.  At most
            the length that the workspace has room for.
        workspace: its work list is written.
        pdl: launched so that it may start while its predecessor ends.
    """
    (num_sequences,) = lengths.shape
    if num_sequences > workspace.max_sequences:
        raise ValueError(f"{num_sequences} sequences, but the workspace has room for {workspace.max_sequences}")
    max_sequences = next_power_of_2(workspace.max_sequences)
    _build_work_list[(num_sequences,)](
        lengths,
        num_sequences,
        *workspace.tensors[:4],
        workspace.num_rows,
        MAX_SEQUENCES=max_sequences,
        AT_ONCE=_SPLITS_AT_ONCE,
        SPLIT=SPLIT_TOKENS,
        PDL=pdl,
        # Every program holds all lengths.
        num_warps=min(32, max(4, max_sequences // 256)),
        **launch_options(pdl),
    )
