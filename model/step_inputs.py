"""A decode step's inputs in one buffer, so that one transfer brings them to the device.  Knows no kernel."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from persimmon.kernels.operands import DrawInputs, TruncationInputs
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import SequenceInput

_ALIGNMENT = 4
"""Every field begins at a multiple of this number of words: kernels are compiled for pointers aligned to 16 bytes."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The inputs of a decode step of B rows, as views into a `StepBuffer`.

    Attributes:
        token_ids: [B] int64; a negative one, -1 - r, stands for the r-th token of the step before.
        draw: how each row is sampled.
        truncation: and from which of its tokens.
        lengths: [B] int32, tokens of each sequence up to and with this one; 0 for padding.
        live: [1] int32, rows that are not padding.
    """

    token_ids: torch.Tensor
    draw: DrawInputs
    truncation: TruncationInputs
    lengths: torch.Tensor
    live: torch.Tensor


class StepBuffer:
    """Room for a step's inputs, field after field, in int32 words; then block tables, as wide as the step needs.

    Args:
        max_rows: rows of the largest step.
        max_blocks: blocks of the longest sequence.
        device: where the buffer is.
        pinned: whether this is host memory for asynchronous transfers.
    """

    def __init__(self, max_rows: int, max_blocks: int, device: torch.device, *, pinned: bool = False) -> None:
        self._most = -(-max_rows // _ALIGNMENT) * _ALIGNMENT
        # Block tables come last: only those of the rows in use travel, and of these only the columns in use.
        self._tables_at = 12 * self._most + _ALIGNMENT
        size = self._tables_at + max_rows * max_blocks
        self.words = torch.zeros(size, dtype=torch.int32, device=device, pin_memory=pinned)

    def size(self, rows: int, width: int) -> int:
        """Words that travel with block tables of `rows` sequences and `width` blocks."""
        return self._tables_at + rows * width

    def block_tables(self, rows: int, width: int) -> torch.Tensor:
        """[rows, width] int32, the first rows' tables, next to each other."""
        return self.words[self._tables_at : self.size(rows, width)].view(rows, width)

    def inputs(self, rows: int) -> StepInputs:
        """The views of the first rows."""
        most, words = self._most, self.words
        wide = words[: 4 * most].view(torch.int64).view(2, most)
        narrow = words[4 * most : 12 * most].view(8, most)
        return StepInputs(
            token_ids=wide[0, :rows],
            draw=DrawInputs(
                seed=wide[1, :rows],
                temperature=narrow[0, :rows].view(torch.float32),
                sample_index=narrow[1, :rows],
                position=narrow[2, :rows],
                wants_logits=narrow[3, :rows],
            ),
            truncation=TruncationInputs(
                active=narrow[3, :rows],
                top_k=narrow[4, :rows],
                top_p=narrow[5, :rows].view(torch.float32),
                min_p=narrow[6, :rows].view(torch.float32),
            ),
            lengths=narrow[7, :rows],
            live=words[12 * most : 12 * most + 1],
        )


def write_step(buffer: StepBuffer, batch: Sequence[SequenceInput], rows: int) -> int:
    """Writes a batch that samples everywhere into a host buffer.

    Args:
        buffer: is written.
        batch: one token a sequence.
        rows: at least as many; those behind the batch are padding.

    Returns:
        The width of the block tables, of which there is one a sequence.
    """
    live, inputs = len(batch), buffer.inputs(rows)
    token_ids, lengths = inputs.token_ids.numpy(), inputs.lengths.numpy()
    token_ids[:live] = [item.token_ids[0] for item in batch]
    token_ids[live:rows] = 0
    lengths[:live] = [item.start + 1 for item in batch]
    lengths[live:rows] = 0
    width = max((len(item.block_table) for item in batch), default=0)
    write_tables(buffer.block_tables(live, width), [item.block_table for item in batch])
    write_draw(inputs, [own for item in batch for own in item.samplings])
    return width


def write_tables(into: torch.Tensor, tables: Sequence[Sequence[int]]) -> None:
    """Writes block tables into [rows, width] int32; what is behind a table's end is zero."""
    rows = into.numpy()
    rows[:] = 0
    for row, table in zip(rows, tables, strict=True):
        row[: len(table)] = table


def write_draw(inputs: StepInputs, params: Sequence[RowSampling]) -> None:
    """Writes how rows are sampled, and how many there are, into host inputs of at least as many rows."""
    live, draw, truncation = len(params), inputs.draw, inputs.truncation
    inputs.live[0] = live
    draw.temperature.numpy()[:live] = [own.asked.temperature for own in params]
    draw.seed.numpy()[:live] = [own.asked.seed for own in params]
    draw.sample_index.numpy()[:live] = [own.sample_index for own in params]
    draw.position.numpy()[:live] = [own.position for own in params]
    truncation.top_k.numpy()[:live] = [own.asked.top_k for own in params]
    truncation.top_p.numpy()[:live] = [own.asked.top_p for own in params]
    truncation.min_p.numpy()[:live] = [own.asked.min_p for own in params]
    draw.wants_logits.numpy()[:live] = np.fromiter((needs_logits(own) for own in params), np.int32, live)
    draw.wants_logits.numpy()[live:] = 0


def needs_another_draw(params: RowSampling) -> bool:
    """Whether a row cannot be sampled while its logits are computed, because these change or some tokens are out."""
    asked = params.asked
    return params.adjusts or (not asked.greedy and (asked.truncates or asked.min_p > 0))


def needs_logits(params: RowSampling) -> bool:
    """Whether a row's logits are read again once they are computed."""
    return needs_another_draw(params) or params.asked.logprobs is not None
