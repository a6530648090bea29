"""The quantized lm_head, interpreted: its logits against float64, its draws against those from these logits."""

from dataclasses import replace

import pytest
import torch

from persimmon.kernels.packed_head import sample_head
from persimmon.kernels.packed_weight import pack
from persimmon.kernels.quantized import Bits
from persimmon.kernels.sampling import SamplingConfig, Workspace, sample_logits
from tests.interpreter import multiply_as_matrix_units
from tests.kernels.quantized_matrices import random_matrix
from tests.kernels.test_sampling import CPU, NAN, draws, live

CONFIG = SamplingConfig(head_tokens=64, slice_tokens=64)


@pytest.fixture(autouse=True)
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_as_matrix_units(monkeypatch)


@pytest.mark.parametrize(("rows", "bits", "group"), [(3, 8, None), (17, 4, 128)])
def test_draws_from_its_logits(rows: int, bits: Bits, group: int | None) -> None:
    matrix = random_matrix((70, 128), bits, group)
    hidden = torch.randn(rows, 128, generator=torch.Generator().manual_seed(1)).half()
    draw = draws([0.0, 1.0, 0.7, *[0.9] * (rows - 3)])
    draw = replace(draw, wants_logits=torch.ones_like(draw.wants_logits))
    logits = torch.full((rows, 70), NAN)
    workspace = Workspace.allocate(rows, 70, CPU, CONFIG)
    drawn = sample_head(hidden, pack(matrix), draw, live(rows), workspace, logits=logits, config=CONFIG)
    tokens, logprobs = (part.clone() for part in drawn)
    exact = hidden.double() @ matrix.dequantized().double().T
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    expected = sample_logits(logits, draw, live(rows), workspace, config=CONFIG)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logprobs, expected[1], rtol=1e-5, atol=2e-5)


def test_a_head_of_another_width_is_refused() -> None:
    hidden, workspace = torch.zeros(2, 64), Workspace.allocate(2, 300, CPU, CONFIG)
    with pytest.raises(ValueError, match=r"shape \(70, 128\) in int8 rows.* does not take hidden states \[2, 64\]"):
        sample_head(hidden, pack(random_matrix((70, 128), 8, None)), draws([0.0, 0.0]), live(2), workspace)
