"""What the first rank of an engine sends the others for each step: what is computed, and which rows are wanted.

How tokens are drawn stays on the first rank.
"""

from collections.abc import Sequence

import msgspec
import numpy as np

from persimmon.model.patches import PatchSpan
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import PooledStates, PromptLogprobs, Report, SequenceInput
from persimmon.model.sampling_params import SamplingParams

_ANY_DRAW = RowSampling(asked=SamplingParams(temperature=0.0))


class RankSequence(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's part of a step; the names are those of `SequenceInput`.

    Attributes:
        draws: how many rows are drawn from, a row once for each sample.
        reported: how many states are reported; 0 for none.
        first_reported: the first of them, among the sequence's tokens in this step.
        logprobs: whether what is reported are log-probabilities, for which logits are made.
        patches: for each span of image patches its start, how many they are, and their pixels.
    """

    token_ids: list[int]
    start: int
    block_table: list[int]
    draws: int
    guesses: int
    prompt_length: int
    reported: int
    first_reported: int
    logprobs: bool
    patches: list[tuple[int, int, bytes]] = []

    @classmethod
    def of(cls, item: SequenceInput) -> "RankSequence":
        """What other ranks need of a sequence."""
        rows = range(0) if item.report is None else item.report.rows
        return cls(
            token_ids=list(item.token_ids),
            start=item.start,
            block_table=list(item.block_table),
            draws=len(item.samplings),
            guesses=item.guesses,
            prompt_length=item.prompt_length,
            reported=len(rows),
            first_reported=rows.start,
            logprobs=isinstance(item.report, PromptLogprobs),
            patches=[(span.start, len(span.pixels), span.pixels.tobytes()) for span in item.patches],
        )

    @property
    def input(self) -> SequenceInput:
        """The sequence for a `FollowingRunner`."""
        report: Report | None = None
        if self.reported and self.logprobs:
            report = PromptLogprobs(self.first_reported, [0] * self.reported, top=0)
        elif self.reported:
            rows = range(self.first_reported, self.first_reported + self.reported)
            report = PooledStates(rows, total=False)
        return SequenceInput(
            token_ids=self.token_ids,
            start=self.start,
            block_table=self.block_table,
            samplings=[_ANY_DRAW] * self.draws,
            report=report,
            prompt_length=self.prompt_length,
            guesses=self.guesses,
            patches=[
                PatchSpan(start, np.frombuffer(pixels, np.uint8).reshape(count, -1))
                for start, count, pixels in self.patches
            ],
        )


class RankStep(msgspec.Struct, frozen=True, array_like=True):
    """A step, or what happens before one.

    Attributes:
        sequences: what is computed; empty where blocks are copied.
        copies: (from, to) blocks to copy.
    """

    sequences: list[RankSequence] = []
    copies: list[tuple[int, int]] = []

    @classmethod
    def of(cls, batch: Sequence[SequenceInput]) -> "RankStep":
        """The step of a batch."""
        return cls(sequences=[RankSequence.of(item) for item in batch])
