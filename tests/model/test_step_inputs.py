"""A decode step's inputs: rows of a batch in their fields, padding behind them."""

import pytest
import torch

from persimmon.model.runner import SequenceInput
from persimmon.model.step_inputs import StepBuffer, StepInputs, write_step
from tests.model.rows import row_with

GREEDY = row_with()


def tensors(inputs: StepInputs) -> list[torch.Tensor]:
    """Every field's, in no order."""
    own = [inputs.token_ids, inputs.lengths, inputs.live]
    draw, truncation = inputs.draw, inputs.truncation
    own += [draw.temperature, draw.seed, draw.sample_index, draw.position, draw.wants_logits]
    return [*own, truncation.top_k, truncation.top_p, truncation.min_p]


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_fields_begin_at_16_bytes_and_share_no_word(rows: int) -> None:
    buffer = StepBuffer(rows, 5, torch.device("cpu"))
    places: list[int] = []
    for tensor in [*tensors(buffer.inputs(rows)), buffer.block_tables(rows, 5)]:
        first = tensor.data_ptr() - buffer.words.data_ptr()
        assert first % 16 == 0
        places += range(first, first + tensor.nbytes)
    assert len(places) == len(set(places))
    assert max(places) < 4 * buffer.size(rows, 5) == buffer.words.nbytes


def test_rows_behind_the_batch_are_padding_whatever_was_there() -> None:
    buffer = StepBuffer(4, 9, torch.device("cpu"))
    inputs = buffer.inputs(4)
    drawn = row_with(temperature=1.0, top_k=3)
    item = SequenceInput(token_ids=[7], start=20, block_table=[1, 2], samplings=(drawn,))
    assert write_step(buffer, [item] * 4, 4) == 2
    assert (inputs.live.item(), inputs.lengths.tolist()) == (4, [21] * 4)
    assert all(inputs.truncation.active)
    batch = [
        SequenceInput(token_ids=[8], start=4, block_table=[3], samplings=(drawn,)),
        SequenceInput(token_ids=[9], start=70, block_table=[5, 6, 7], samplings=(GREEDY,)),
    ]
    assert write_step(buffer, batch, 4) == 3
    assert buffer.block_tables(2, 3).tolist() == [[3, 0, 0], [5, 6, 7]]
    assert (inputs.live.item(), inputs.lengths.tolist()) == (2, [5, 71, 0, 0])
    assert inputs.draw.wants_logits.tolist() == [1, 0, 0, 0]
