"""Draws from logits, interpreted, against draws in numpy; and that those draws are from the right distribution."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from persimmon.kernels import reference_sampling
from persimmon.kernels.operands import DrawInputs
from persimmon.kernels.reference_sampling import gumbel
from persimmon.kernels.sampling import SamplingConfig, Workspace, logits_tile, sample_logits
from tests.interpreter import multiply_bfloat16

CPU = torch.device("cpu")
NAN = float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = SamplingConfig(head_tokens=64, slice_tokens=256)
"""Tiles that a vocabulary of a few hundred still fills several of."""


@pytest.fixture(autouse=True)
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_bfloat16(monkeypatch)


def draws(temperatures: list[float], seed: int = 0) -> DrawInputs:
    """One row a temperature, each with a seed, sample and position of its own."""
    rows = len(temperatures)
    generator = np.random.default_rng(seed)
    return DrawInputs(
        temperature=torch.tensor(temperatures),
        seed=torch.from_numpy(generator.integers(0, 2**63, rows)),
        sample_index=torch.from_numpy(generator.integers(0, 20, rows)).int(),
        position=torch.from_numpy(generator.integers(0, 16384, rows)).int(),
        wants_logits=torch.zeros(rows, dtype=torch.int32),
    )


def rows_of(draw: DrawInputs, rows: list[int]) -> DrawInputs:
    return DrawInputs(*(getattr(draw, field.name)[rows].contiguous() for field in fields(draw)))


def live(rows: int) -> torch.Tensor:
    return torch.tensor([rows], dtype=torch.int32)


def run_logits(
    logits: torch.Tensor, draw: DrawInputs, config: SamplingConfig = SMALL
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, vocab_size = logits.shape
    workspace = Workspace.allocate(rows, vocab_size, CPU, config)
    return sample_logits(logits, draw, live(rows), workspace, config=config)


def assert_agree(actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert actual[0].dtype == torch.int64
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=2e-5)


class TestGumbel:
    def test_follows_the_gumbel_distribution(self) -> None:
        noise = np.sort(gumbel(1, 0, 0, 200_000).astype(np.float64))
        expected = np.exp(-np.exp(-noise))
        steps = np.arange(1, len(noise) + 1) / len(noise)
        # Kolmogorov-Smirnov: 1.63 / sqrt(n) is passed by 1% of samples.
        assert np.abs(steps - expected).max() < 1.63 / np.sqrt(len(noise))

    def test_its_ends_are_finite(self, monkeypatch: pytest.MonkeyPatch) -> None:
        words = np.array([[0], [2**32 - 1], [1], [2**31]], dtype=np.uint64)
        monkeypatch.setattr(reference_sampling, "philox", lambda counter, key: words)
        noise = gumbel(0, 0, 0, 4)
        exact = -np.log(-np.log1p(-(np.array([0.5, 2**32 - 256, 1.5, 2**31]) * 2.0**-32)))
        np.testing.assert_allclose(noise, exact, rtol=1e-5)

    @pytest.mark.parametrize("bit", range(63))
    def test_every_bit_of_the_seed_matters(self, bit: int) -> None:
        assert not np.array_equal(gumbel(5, 0, 0, 8), gumbel(5 ^ (1 << bit), 0, 0, 8))

    def test_every_setting_and_id_has_noise_of_its_own(self) -> None:
        drawn = np.concatenate([gumbel(3, index, position, 64) for index in range(4) for position in range(4)])
        assert len(np.unique(drawn)) == drawn.size

    def test_philox_gives_the_published_words(self) -> None:
        # From kat_vectors of the authors' Random123.
        zero = reference_sampling.philox(np.zeros((4, 1), np.uint64), np.zeros((2, 1), np.uint64))
        assert [hex(word) for word in zero[:, 0]] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]

    def test_the_reference_draws_from_the_softmax(self) -> None:
        logits = torch.tensor([1.0, -1.0, 0.0, 2.0, -6.0, 0.5, -0.5])
        positions = 10_000
        noise = np.stack([gumbel(11, 0, position, 7) for position in range(positions)])
        tokens = (logits.numpy() + 0.8 * noise).argmax(-1)
        expected = (logits.double() / 0.8).softmax(0).numpy() * positions
        squares = (np.bincount(tokens, minlength=7) - expected) ** 2 / expected
        # Chi-square with 6 degrees of freedom: 16.8 is passed by 1% of samples.
        assert squares.sum() < 16.8


class TestSampleLogits:
    @pytest.mark.parametrize("vocab_size", [1, 5, 256, 300, 777])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_draws_what_the_reference_draws(self, dtype: torch.dtype, vocab_size: int) -> None:
        draw = draws([0.0, 0.3, 0.7, 1.0, 1.5])
        logits = (torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 3).to(dtype)
        assert_agree(run_logits(logits, draw), reference_sampling.sample(logits, draw))

    def test_follows_the_softmax(self) -> None:
        rows, vocab_size = 300, 4
        logits = torch.tensor([1.0, -1.0, 0.0, 2.0])
        draw = draws([0.8] * rows, seed=3)
        config = replace(SMALL, slice_tokens=16)
        tokens, _ = run_logits(logits.repeat(rows, 1), draw, config)
        expected = (logits.double() / 0.8).softmax(0) * rows
        squares = (torch.bincount(tokens, minlength=vocab_size) - expected) ** 2 / expected
        # Chi-square with 3 degrees of freedom: 11.3 is passed by 1% of samples.
        assert float(squares.sum()) < 11.3

    def test_neither_slice_nor_place_in_the_batch_changes_a_draw(self) -> None:
        logits = torch.randn(4, 700)
        draw = draws([0.0, 0.5, 1.0, 2.0])
        expected = run_logits(logits, draw)
        order = [2, 0, 3, 1]
        shuffled = run_logits(logits[order], rows_of(draw, order))
        assert torch.equal(shuffled[0], expected[0][order])
        assert torch.equal(shuffled[1], expected[1][order])
        for slice_tokens in (16, 64, 1024):
            assert_agree(run_logits(logits, draw, replace(SMALL, slice_tokens=slice_tokens)), expected)

    def test_the_lowest_id_wins_among_equals(self) -> None:
        logits = torch.zeros(3, 600)
        logits[1, [590, 300, 301]] = 1.0
        logits[2, 255:257] = 1.0
        tokens, logprobs = run_logits(logits, draws([0.0, 0.0, 0.0]))
        assert tokens.tolist() == [0, 300, 255]
        assert logprobs[0].item() == pytest.approx(-np.log(600), abs=1e-5)

    @pytest.mark.parametrize("temperature", [1e-30, 1e-6])
    def test_a_tiny_temperature_is_greedy(self, temperature: float) -> None:
        logits = torch.randn(4, 500) * 1000
        assert torch.equal(run_logits(logits, draws([temperature] * 4))[0], logits.argmax(-1))

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_huge_infinite_and_missing_logits_do_no_harm(self) -> None:
        logits = torch.randn(6, 400)
        logits[0] = -torch.inf
        logits[0, 390] = -3e38
        logits[1, 77] = 3e38
        logits[2, :399] = NAN
        logits[3] = NAN
        logits[4, 5] = torch.inf
        logits[5] = -torch.inf
        draw = draws([1.0] * 6)
        tokens, logprobs = run_logits(logits, draw)
        assert tokens.tolist() == [390, 77, 399, 0, 5, 0]
        assert logprobs[[0, 1, 2, 4]].tolist() == [0.0] * 4

    def test_padding_rows_are_left_alone(self) -> None:
        logits = torch.randn(5, 300)
        logits[3:] = NAN
        draw = draws([1.0] * 5)
        workspace = Workspace.allocate(5, 300, CPU, SMALL)
        workspace.tokens.fill_(-7)
        tokens, _ = sample_logits(logits, draw, live(3), workspace, config=SMALL)
        assert torch.equal(tokens[:3], run_logits(logits[:3], rows_of(draw, [0, 1, 2]))[0])
        assert tokens[3:].tolist() == [-7, -7]


@triton.jit  # type: ignore[untyped-decorator]
def _copy_slice(logits, out, row, first, vocab_size, SLICE: tl.constexpr):
    x, _ids = logits_tile(logits, row, first, vocab_size, SLICE)
    tl.store(out + tl.arange(0, SLICE), x)


@pytest.mark.parametrize("row", [8191, 8192])
def test_offsets_of_logits_go_beyond_31_bits(row: int) -> None:
    """In a tensor of which only the row in question is ever touched, and so takes memory."""
    vocab_size = 262_144
    logits = torch.empty(8193, vocab_size, dtype=torch.float16)
    logits[row, -16:] = torch.arange(16)
    out = torch.empty(16)
    _copy_slice[(1,)](logits, out, row, vocab_size - 16, vocab_size, SLICE=16)
    assert out.tolist() == list(range(16))


@pytest.mark.parametrize("setting", [{"head_tokens": 8}, {"head_tokens": 2048}, {"slice_tokens": 8192}])
def test_tiles_that_could_overflow_are_refused(setting: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="holds 16 to"):
        SamplingConfig(**setting)


def test_the_workspace_says_what_it_takes() -> None:
    workspace = Workspace.allocate(3, 1000, CPU, SMALL)
    taken = sum(getattr(workspace, field.name).nbytes for field in fields(workspace))
    assert taken == Workspace.bytes(3, 1000, SMALL)
