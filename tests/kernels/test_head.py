"""lm_head and its draws, interpreted: its logits against float64, its draws against those from these logits."""

from dataclasses import replace

import pytest
import torch

from persimmon.kernels import reference_sampling
from persimmon.kernels.head import _NOT_PACKED, _head_kernel, sample_head
from persimmon.kernels.operands import DrawInputs
from persimmon.kernels.packed_weight import pack
from persimmon.kernels.quantized import Bits
from persimmon.kernels.sampling import SamplingConfig, Workspace, sample_logits
from tests.interpreter import multiply_as_matrix_units, multiply_bfloat16
from tests.kernels.quantized_matrices import random_matrix
from tests.kernels.test_sampling import CPU, DTYPES, NAN, SMALL, assert_agree, draws, live, rows_of, run_logits

PACKED = SamplingConfig(head_tokens=64, slice_tokens=64)


@pytest.fixture(autouse=True)
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_bfloat16(monkeypatch)


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_as_matrix_units(monkeypatch)


def run_head(
    hidden: torch.Tensor, weight: torch.Tensor, draw: DrawInputs, config: SamplingConfig = SMALL
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, log-probabilities and the logits of all rows."""
    logits = torch.full((len(hidden), len(weight)), NAN)
    workspace = Workspace.allocate(len(hidden), len(weight), CPU, config)
    draw = replace(draw, wants_logits=torch.ones_like(draw.wants_logits))
    tokens, logprobs = sample_head(hidden, weight, draw, live(len(hidden)), workspace, logits=logits, config=config)
    return tokens, logprobs, logits


def random_head(rows: int, vocab_size: int, depth: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + vocab_size + depth)
    hidden = torch.randn(rows, depth, generator=generator)
    return hidden.to(dtype), (torch.randn(vocab_size, depth, generator=generator) * 2 / depth**0.5).to(dtype)


class TestSampleHead:
    @pytest.mark.parametrize(
        ("rows", "vocab_size", "depth"), [(1, 300, 128), (3, 100, 64), (20, 257, 96), (33, 90, 40)]
    )
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_draws_what_the_reference_draws_from_its_logits(
        self, dtype: torch.dtype, rows: int, vocab_size: int, depth: int
    ) -> None:
        hidden, weight = random_head(rows, vocab_size, depth, dtype)
        draw = draws([0.0, 0.4, 1.0, 1.3] * 9, seed=rows)
        draw = rows_of(draw, list(range(rows)))
        tokens, logprobs, logits = run_head(hidden, weight, draw)
        exact = hidden.double() @ weight.double().T
        torch.testing.assert_close(logits, exact.float(), rtol=1e-5, atol=1e-5)
        assert_agree((tokens, logprobs), reference_sampling.sample(logits, draw))

    def test_no_bit_of_a_row_depends_on_the_rows_beside_it(self) -> None:
        # In eighths every product and sum is exact: the interpreter's matmul may round by shape, the kernel's must not.
        hidden, weight = (((tensor * 8).round() / 8) for tensor in random_head(40, 150, 64, torch.float16))
        draw = draws([1.0] * 40)
        tokens, logprobs, logits = run_head(hidden, weight, draw)
        for own in ([0], [39], [5, 17, 30], list(range(20, 40))):
            alone = run_head(hidden[own], weight, rows_of(draw, own))
            assert torch.equal(alone[0], tokens[own])
            assert torch.equal(alone[1], logprobs[own])
            assert torch.equal(alone[2], logits[own])

    def test_tiles_do_not_change_a_draw(self) -> None:
        hidden, weight = random_head(70, 200, 64, torch.float32)
        draw = draws([0.0, 1.0] * 35)
        expected = run_head(hidden, weight, draw)
        for config in (
            replace(SMALL, head_tokens=128),
            replace(SMALL, head_rows=16),
            replace(SMALL, head_depth_bytes=64),
        ):
            tokens, logprobs, _ = run_head(hidden, weight, draw, config)
            assert_agree((tokens, logprobs), expected[:2])

    def test_draws_what_sample_logits_draws(self) -> None:
        hidden, weight = random_head(6, 500, 64, torch.bfloat16)
        draw = draws([1.0] * 6)
        tokens, logprobs, logits = run_head(hidden, weight, draw)
        assert_agree(run_logits(logits, draw), (tokens, logprobs))

    def test_the_lowest_id_wins_among_equals_in_and_across_tiles(self) -> None:
        weight = torch.zeros(300, 32)
        weight[[70, 100, 290]] = 1.0
        tokens, _, _ = run_head(torch.ones(1, 32), weight, draws([0.0]))
        assert tokens.tolist() == [70]

    def test_padding_rows_are_not_read_and_only_flagged_rows_write_logits(self) -> None:
        hidden, weight = random_head(20, 100, 64, torch.float16)
        hidden[17:] = NAN
        draw = draws([1.0] * 20)
        expected = run_head(hidden[:17].contiguous(), weight, rows_of(draw, list(range(17))))
        draw.wants_logits[[3, 18]] = 1
        workspace = Workspace.allocate(20, 100, CPU, SMALL)
        workspace.tokens.fill_(-7)
        logits = torch.full((20, 100), 5.0)
        tokens, logprobs = sample_head(hidden, weight, draw, live(17), workspace, logits=logits, config=SMALL)
        assert torch.equal(tokens[:17], expected[0])
        assert torch.equal(logprobs[:17], expected[1])
        assert tokens[17:].tolist() == [-7] * 3
        assert torch.equal(logits[3], expected[2][3])
        assert (logits[torch.arange(20) != 3] == 5.0).all()

    def test_logits_need_not_be_written(self) -> None:
        hidden, weight = random_head(2, 100, 64, torch.float16)
        draw = draws([1.0, 0.0])
        workspace = Workspace.allocate(2, 100, CPU, SMALL)
        alone = sample_head(hidden, weight, draw, live(2), workspace, config=SMALL)
        assert_agree(alone, run_head(hidden, weight, draw)[:2])

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_a_row_of_nan_gets_a_token_of_the_vocabulary(self) -> None:
        hidden, weight = random_head(2, 100, 64, torch.float32)
        hidden[0] = NAN
        tokens, _, _ = run_head(hidden, weight, draws([1.0, 1.0]))
        assert 0 <= int(tokens[0]) < 100


def test_offsets_of_written_logits_go_beyond_31_bits() -> None:
    """In a tensor of which only the rows in question are ever touched, and so take memory."""
    rows, vocab_size, depth = 33, 2**26, 16
    hidden, weight = random_head(rows, 16, depth, torch.float32)
    draw = draws([0.0] * rows)
    draw.wants_logits[-1] = 1
    logits = torch.empty(rows, vocab_size, dtype=torch.float16)
    workspace = Workspace.allocate(rows, 16, CPU, SMALL)
    partials = (workspace.scores, workspace.ids, workspace.winner_logits, workspace.maxima, workspace.sums)
    settings = (draw.temperature, draw.seed, draw.sample_index, draw.position, draw.wants_logits)
    _head_kernel[(1,)](
        hidden, weight, None, *settings, live(rows), logits, *partials, vocab_size, 1, 1, rows,
        K=depth, BLOCK_N=16, BLOCK_M=64, BLOCK_K=16, PADDED_K=128, STAGES=1, PDL=False, **_NOT_PACKED,
    )  # fmt: skip
    torch.testing.assert_close(logits[-1, :16].float(), weight @ hidden[-1], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("rows", "bits", "group"), [(3, 8, None), (17, 4, 128)])
@pytest.mark.usefixtures("exact_products")
def test_a_quantized_head_draws_from_its_logits(rows: int, bits: Bits, group: int | None) -> None:
    matrix = random_matrix((70, 128), bits, group)
    hidden = torch.randn(rows, 128, generator=torch.Generator().manual_seed(1)).half()
    draw = draws([0.0, 1.0, 0.7, *[0.9] * (rows - 3)])
    draw = replace(draw, wants_logits=torch.ones_like(draw.wants_logits))
    logits = torch.full((rows, 70), NAN)
    workspace = Workspace.allocate(rows, 70, CPU, PACKED)
    drawn = sample_head(hidden, pack(matrix), draw, live(rows), workspace, logits=logits, config=PACKED)
    tokens, logprobs = (part.clone() for part in drawn)
    exact = hidden.double() @ matrix.dequantized().double().T
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    expected = sample_logits(logits, draw, live(rows), workspace, config=PACKED)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logprobs, expected[1], rtol=1e-5, atol=2e-5)


def test_a_quantized_head_of_another_width_is_refused() -> None:
    hidden, workspace = torch.zeros(2, 64), Workspace.allocate(2, 300, CPU, PACKED)
    with pytest.raises(ValueError, match=r"shape \(70, 128\) in int8 rows.* does not take hidden states \[2, 64\]"):
        sample_head(hidden, pack(random_matrix((70, 128), 8, None)), draws([0.0, 0.0]), live(2), workspace)
