"""The sampler: Philox, greedy, truncation and the distribution it draws from, each against a naive float64 version."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from persimmon.kernels.cpu.native import NativeKernels
from persimmon.kernels.reference_sampling import philox
from persimmon.model import sampler
from persimmon.model.native_draw import NativeDraw
from persimmon.model.row_sampling import RowSampling
from persimmon.model.sampler import Samples, uniform
from tests.cpu_builds import FLOAT_BUILDS
from tests.model.rows import changed, row_with

INFINITY = float("inf")

# Random123's known-answer vectors for philox4x32-10 (kat_vectors): counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.fixture(params=["torch", *FLOAT_BUILDS], scope="module", autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test runs with each implementation."""
    if request.param != "torch":
        _ways.append(NativeDraw(NativeKernels(request.param)))
    yield
    _ways[1:] = []


_ways: list[sampler.Draw] = [sampler.draw]


def sample(logits: torch.Tensor, params: Sequence[RowSampling]) -> Samples:
    return sampler.sample(logits, params, _ways[-1])


def draw(logits: Sequence[float], params: RowSampling, count: int) -> list[int]:
    """The tokens at `count` successive positions that all have the same logits."""
    rows = torch.tensor([list(logits)]).repeat(count, 1)
    return sample(rows, [replace(params, position=position) for position in range(count)]).tokens.tolist()


def naive_distribution(logits: Sequence[float], params: RowSampling) -> dict[int, float]:
    """The probability of each token that may be drawn: temperature, then min-p, top-k and top-p one after the other."""
    weight = {token: math.exp((logit - max(logits)) / params.asked.temperature) for token, logit in enumerate(logits)}
    weight = {token: own for token, own in weight.items() if own >= params.asked.min_p}
    ranked = sorted(weight, key=lambda token: (-logits[token], token))
    if params.asked.top_k > 0:
        ranked = ranked[: params.asked.top_k]
    total = math.fsum(weight[token] for token in ranked)
    kept: list[int] = []
    reached = 0.0
    for token in ranked:
        if kept and params.asked.top_p < 1 and reached >= params.asked.top_p:
            break
        kept.append(token)
        reached += weight[token] / total
    total = math.fsum(weight[token] for token in kept)
    return {token: weight[token] / total for token in kept}


def assert_drawn_from(expected: dict[int, float], tokens: Sequence[int]) -> None:
    """Chi-square over tokens expected at least 5 times; the bound is passed by chance once in about a million runs."""
    counts = np.bincount(tokens, minlength=max(expected) + 1)
    assert set(np.flatnonzero(counts).tolist()) <= set(expected)
    common = {token: share * len(tokens) for token, share in expected.items() if share * len(tokens) >= 5}
    statistic = sum((counts[token] - mean) ** 2 / mean for token, mean in common.items())
    freedom = max(len(common) - 1, 1)
    # Wilson and Hilferty's approximation of the chi-square quantile at 4.75 standard deviations.
    bound = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < bound, f"chi-square {statistic:.1f} over {freedom} degrees of freedom"


class TestPhilox:
    @pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
    def test_gives_the_known_answers(
        self, counter: tuple[int, ...], key: tuple[int, ...], result: tuple[int, ...]
    ) -> None:
        column = philox(np.array(counter, dtype=np.uint64)[:, None], np.array(key, dtype=np.uint64)[:, None])
        assert tuple(column[:, 0].tolist()) == result

    def test_computes_each_column_for_itself(self) -> None:
        counters = np.array([counter for counter, _, _ in KNOWN_ANSWERS], dtype=np.uint64).T
        keys = np.array([key for _, key, _ in KNOWN_ANSWERS], dtype=np.uint64).T
        assert philox(counters, keys).T.tolist() == [list(result) for _, _, result in KNOWN_ANSWERS]


class TestUniform:
    def test_takes_53_bits_of_the_first_two_words(self) -> None:
        counter = np.array([5, 7, 0, 0], dtype=np.uint64)[:, None]
        key = np.array([0x89ABCDEF, 0x01234567], dtype=np.uint64)[:, None]
        first, second = philox(counter, key)[:2, 0].tolist()
        (drawn,) = uniform([row_with(seed=0x0123456789ABCDEF, position=5, sample_index=7)])
        assert drawn == ((first << 21) | (second >> 11)) / 2**53

    def test_is_uniform_below_one(self) -> None:
        draws = uniform([row_with(seed=3, position=position) for position in range(20_000)])
        assert draws.min() >= 0
        assert draws.max() < 1
        assert_drawn_from(dict.fromkeys(range(50), 1 / 50), (draws * 50).astype(np.int64).tolist())

    @pytest.mark.parametrize(
        "changes",
        [
            [{"position": position} for position in range(1000)],
            [{"sample_index": index} for index in range(1000)],
            [{"seed": seed} for seed in range(1000)],
            [{"seed": seed << 32} for seed in range(1000)],
            [{"seed": 2**63 - 1 - seed} for seed in range(1000)],
        ],
        ids=["positions", "sample indices", "seeds", "seeds above 32 bits", "the largest seeds"],
    )
    def test_differs_between(self, changes: list[dict[str, Any]]) -> None:
        draws = uniform([changed(row_with(seed=11, position=2), **change) for change in changes])
        assert len(set(draws.tolist())) == len(changes)
        # Neighbours are unrelated, not merely different.
        assert abs(float(np.corrcoef(draws[:-1], draws[1:])[0, 1])) < 0.15


class TestGreedy:
    def test_takes_the_most_probable_token(self) -> None:
        logits = torch.randn(40, 501, generator=torch.Generator().manual_seed(0))
        tokens = sample(logits, [row_with()] * 40).tokens.tolist()
        assert tokens == [int(np.argmax(row)) for row in logits.numpy()]

    @pytest.mark.parametrize("size", [2, 17, 4096, 70_000])
    def test_takes_the_lowest_id_among_equals(self, size: int) -> None:
        logits = torch.zeros(3, size)
        logits[1, size // 2] = logits[1, size - 1] = 1.0
        logits[2, size - 1] = 1.0
        assert sample(logits, [row_with()] * 3).tokens.tolist() == [0, size // 2, size - 1]

    def test_ignores_the_other_settings(self) -> None:
        params = row_with(temperature=0.0, top_p=0.1, top_k=1, min_p=0.9, seed=5)
        assert draw([0.0, 3.0, 1.0], params, 50) == [1] * 50


class TestDistribution:
    LOGITS = (1.0, -1.0, 0.5, 2.0, 0.0, 2.0, -3.0, 1.5, 0.25, -0.5)

    @pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.0])
    def test_is_softmax_with_temperature(self, temperature: float) -> None:
        params = row_with(temperature=temperature, seed=1)
        assert_drawn_from(naive_distribution(self.LOGITS, params), draw(self.LOGITS, params, 20_000))

    def test_covers_a_large_vocabulary(self) -> None:
        logits = (np.random.default_rng(0).normal(size=5000) * 3).tolist()
        params = row_with(temperature=1.0, seed=4)
        assert_drawn_from(naive_distribution(logits, params), draw(logits, params, 10_000))

    @pytest.mark.parametrize(
        "settings_",
        [
            {"top_k": 1},
            {"top_k": 3},
            {"top_k": 9},
            {"top_k": 10},
            {"top_k": 1000},
            {"top_p": 0.0},
            {"top_p": 1e-9},
            {"top_p": 0.2},
            {"top_p": 0.5},
            {"top_p": 0.93},
            {"top_p": 0.999_999},
            {"top_p": 1.0},
            {"min_p": 0.01},
            {"min_p": 0.25},
            {"min_p": 1.0},
            {"top_k": 5, "top_p": 0.8},
            {"top_k": 5, "min_p": 0.3},
            {"top_p": 0.8, "min_p": 0.1},
            {"top_k": 4, "top_p": 0.9, "min_p": 0.2, "temperature": 1.7},
            {"top_k": 6, "top_p": 0.5, "min_p": 0.05, "temperature": 0.4},
        ],
        ids=str,
    )
    def test_keeps_what_the_naive_version_keeps(self, settings_: dict[str, Any]) -> None:
        params = row_with(**{"temperature": 1.0, "seed": 2, **settings_})
        expected = naive_distribution(self.LOGITS, params)
        tokens = draw(self.LOGITS, params, 20_000)
        likely = {token for token, share in expected.items() if share > 0.001}
        assert likely <= set(tokens) <= set(expected)
        assert_drawn_from(expected, tokens)

    @settings(max_examples=60, deadline=None)
    @given(
        # Multiples of a half, so that ties are common.
        halves=st.lists(st.integers(-4, 4), min_size=1, max_size=8),
        temperature=st.sampled_from([0.5, 1.0, 1.9]),
        top_k=st.integers(0, 9),
        top_p=st.sampled_from([0.001, 0.3, 0.61, 0.9, 1.0]),
        min_p=st.sampled_from([0.0, 0.07, 0.31, 0.9]),
    )
    def test_keeps_what_the_naive_version_keeps_for_any_settings(
        self, halves: list[int], temperature: float, top_k: int, top_p: float, min_p: float
    ) -> None:
        logits = [half / 2 for half in halves]
        params = row_with(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=9)
        expected = naive_distribution(logits, params)
        # No boundary within rounding: a cumulative probability that equals top_p may fall on either side.
        for nudge in (-1e-5, 1e-5):
            nudged = changed(params, top_p=top_p if top_p == 1 else top_p + nudge, min_p=max(0.0, min_p + nudge))
            assume(naive_distribution(logits, nudged).keys() == expected.keys())
        tokens = set(draw(logits, params, 3000))
        assert {token for token, share in expected.items() if share > 0.01} <= tokens <= set(expected)

    def test_top_k_keeps_the_lowest_ids_among_equals(self) -> None:
        tokens = draw([0.0, 1.0, 0.0, 1.0, 1.0, 1.0], row_with(temperature=1.0, top_k=3, seed=1), 2000)
        assert set(tokens) == {1, 3, 4}

    def test_top_p_keeps_the_lowest_ids_among_equals(self) -> None:
        tokens = draw([0.0, 0.0, 0.0, 0.0], row_with(temperature=1.0, top_p=0.5, seed=1), 2000)
        assert set(tokens) == {0, 1}

    def test_top_p_counts_within_what_top_k_kept(self) -> None:
        # Of all four 0.7 needs three tokens; of the two that top-k keeps, their halves, it needs two.
        tokens = draw([0.0, 0.0, 0.0, 0.0], row_with(temperature=1.0, top_p=0.4, top_k=2, seed=1), 2000)
        assert set(tokens) == {0}

    def test_min_p_follows_the_temperature(self) -> None:
        # exp(-2) is below 0.3; exp(-2 / 2) is above.
        assert set(draw([0.0, -2.0], row_with(temperature=1.0, min_p=0.3, seed=1), 2000)) == {0}
        assert set(draw([0.0, -2.0], row_with(temperature=2.0, min_p=0.3, seed=1), 2000)) == {0, 1}

    def test_tiny_top_p_keeps_exactly_one_token(self) -> None:
        logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(1))
        best = logits.argmax(-1).tolist()
        params = [row_with(temperature=1.5, top_p=1e-12, seed=seed) for seed in range(64)]
        assert sample(logits, params).tokens.tolist() == best

    def test_whole_top_p_never_drops_a_token(self) -> None:
        # The last tokens' share is lost in the rounding of a sum near one; they must stay drawable all the same.
        logits = torch.zeros(1, 1000)
        logits[0, 0] = 5.0
        params = row_with(temperature=1.0, top_p=1.0, top_k=1000, seed=3)
        tokens = draw(logits[0].tolist(), params, 20_000)
        assert_drawn_from(naive_distribution(logits[0].tolist(), params), tokens)
        assert max(tokens) > 950


class TestExtremes:
    @pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38, 1e-45, 1e-60, 5e-324])
    def test_tiny_temperature_takes_the_most_probable_token(self, temperature: float) -> None:
        assert draw([1.0, 3.0, 2.9, -5.0], row_with(temperature=temperature, seed=1), 200) == [1] * 200

    def test_tiny_temperature_draws_among_equals(self) -> None:
        tokens = draw([2.0, 3.0, 3.0, -5.0], row_with(temperature=1e-30, seed=1), 500)
        assert set(tokens) == {1, 2}

    @pytest.mark.parametrize("extra", [{}, {"top_p": 0.9}, {"top_k": 2}, {"min_p": 0.1}], ids=str)
    @pytest.mark.parametrize("scale", [1e4, 1e30, 3e38])
    def test_huge_logits_do_not_overflow(self, scale: float, extra: dict[str, Any]) -> None:
        params = row_with(**{"temperature": 0.5, "seed": 1, **extra})
        assert set(draw([-scale, scale, 0.0, scale], params, 500)) == {1, 3}
        assert draw([-scale, -scale / 2, -scale], params, 200) == [1] * 200

    def test_a_token_of_probability_zero_is_never_drawn(self) -> None:
        tokens = draw([-INFINITY, 0.0, -INFINITY, 0.0, -INFINITY], row_with(temperature=1.0, seed=1), 2000)
        assert set(tokens) == {1, 3}

    def test_a_draw_on_a_border_takes_the_next_token_that_has_a_probability(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if _ways[-1] is not sampler.draw:
            pytest.skip("its numbers cannot be chosen")
        draws = [0.0, 0.25, 0.5, 0.75, 1 - 2**-53]
        monkeypatch.setattr("persimmon.model.sampler.uniform", lambda params: np.array(draws))
        logits = torch.tensor([[-INFINITY, 0.0, -INFINITY, 0.0, 0.0, 0.0, -INFINITY]]).repeat(len(draws), 1)
        assert sample(logits, [row_with(temperature=1.0)] * len(draws)).tokens.tolist() == [1, 3, 4, 5, 5]

    def test_a_vocabulary_of_one_token_is_drawn_from(self) -> None:
        assert draw([0.5], row_with(temperature=1.0, top_k=3, top_p=0.5, min_p=0.5, seed=1), 20) == [0] * 20

    @pytest.mark.parametrize("bad", [float("nan"), INFINITY])
    @pytest.mark.parametrize("whole_row", [True, False])
    def test_a_broken_row_does_not_disturb_the_others(self, bad: float, whole_row: bool) -> None:
        logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(2))
        params = [row_with(temperature=0.0 if row % 3 == 0 else 1.0, top_p=0.9, seed=row) for row in range(8)]
        undisturbed = sample(logits.clone(), params).tokens.tolist()
        for row in (0, 4):
            broken = logits.clone()
            broken[row, slice(None) if whole_row else slice(7, 8)] = bad
            tokens = sample(broken, params).tokens.tolist()
            assert 0 <= tokens[row] < 100
            del tokens[row]
            assert tokens == undisturbed[:row] + undisturbed[row + 1 :]


class TestIndependence:
    """A row's token depends only on its own logits and settings."""

    @staticmethod
    def mixed_batch() -> tuple[torch.Tensor, list[RowSampling]]:
        generator = torch.Generator().manual_seed(5)
        kinds = [
            row_with(),
            row_with(temperature=1.0),
            row_with(temperature=0.8, top_p=0.9),
            row_with(temperature=1.2, top_k=20),
            row_with(temperature=1.0, min_p=0.05),
            row_with(temperature=1.5, top_k=50, top_p=0.7, min_p=0.01),
        ]
        params = [changed(kinds[row % len(kinds)], seed=row, position=row * 3) for row in range(33)]
        return torch.randn(33, 1003, generator=generator) * 2, params

    def test_of_the_rows_beside_it(self) -> None:
        logits, params = self.mixed_batch()
        together = sample(logits.clone(), params).tokens.tolist()
        alone = [int(sample(logits[row : row + 1].clone(), [params[row]]).tokens) for row in range(len(params))]
        assert together == alone

    def test_of_its_place(self) -> None:
        logits, params = self.mixed_batch()
        together = sample(logits.clone(), params).tokens.tolist()
        for seed in range(5):
            order = np.random.default_rng(seed).permutation(len(params)).tolist()
            shuffled = sample(logits[order], [params[row] for row in order]).tokens.tolist()
            assert shuffled == [together[row] for row in order]

    def test_rows_of_different_seeds_draw_differently(self) -> None:
        tokens = sample(torch.zeros(50, 10_000), [row_with(temperature=1.0, seed=seed) for seed in range(50)]).tokens
        assert len(set(tokens.tolist())) > 45

    def test_of_the_implementation(self) -> None:
        logits = 3 * torch.randn(300, 1000, generator=torch.Generator().manual_seed(9))
        settings_: list[dict[str, Any]] = [
            {},
            {"top_p": 0.8},
            {"top_k": 7},
            {"min_p": 0.05},
            {"top_k": 30, "top_p": 0.6, "min_p": 0.01},
        ]
        params = [
            row_with(
                temperature=0.3 + row % 7 / 5, seed=row**5, sample_index=row % 3, position=row, **settings_[row % 5]
            )
            for row in range(len(logits))
        ]
        assert sample(logits, params).tokens.tolist() == sampler.sample(logits, params).tokens.tolist()

    def test_the_same_request_draws_the_same_again(self) -> None:
        logits, params = self.mixed_batch()
        assert sample(logits.clone(), params).tokens.tolist() == sample(logits.clone(), params).tokens.tolist()

    def test_no_rows_give_no_tokens(self) -> None:
        assert sample(torch.empty(0, 10), []).tokens.shape == (0,)
