"""Penalties and truncated draws, interpreted, against sorting in float64."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from persimmon.kernels import reference_sampling
from persimmon.kernels.operands import DrawInputs, PenaltyInputs, TruncationInputs
from persimmon.kernels.reference_sampling import gumbel, kept
from persimmon.kernels.sampling import SamplingConfig, Workspace, sample_logits
from persimmon.kernels.truncation import TruncationWorkspace, apply_penalties, sample_truncated
from tests.kernels.test_sampling import CPU, NAN, assert_agree, draws, live

# numpy warns where a GPU does not: of log(0), and of 0 / 0 that is then not chosen.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SMALL = SamplingConfig(slice_tokens=256)
"""Slices that a vocabulary of a few hundred still fills several of."""
ONE_SLICE = SamplingConfig(slice_tokens=512)
"""For what slices have no part in: half the programs to interpret."""


def rules(*rows: tuple[int, float, float]) -> TruncationInputs:
    """One active row for each (top_k, top_p, min_p)."""
    top_k, top_p, min_p = zip(*rows, strict=True)
    return TruncationInputs(
        active=torch.ones(len(rows), dtype=torch.int32),
        top_k=torch.tensor(top_k, dtype=torch.int32),
        top_p=torch.tensor(top_p, dtype=torch.float32),
        min_p=torch.tensor(min_p, dtype=torch.float32),
    )


def truncated(
    logits: torch.Tensor, draw: DrawInputs, truncation: TruncationInputs, config: SamplingConfig = SMALL
) -> tuple[torch.Tensor, torch.Tensor]:
    """The draws, from workspaces full of what an earlier step may have left there."""
    rows, vocab_size = logits.shape
    workspace = Workspace.allocate(rows, vocab_size, CPU, config)
    search = TruncationWorkspace.allocate(rows, vocab_size, CPU, config)
    for stale in (workspace.scores, workspace.winner_logits, workspace.maxima, workspace.sums, search.maxima):
        stale.fill_(NAN)
    for stale in (search.digits, search.searches):
        stale.fill_(-1)
    workspace.tokens.fill_(-7)
    return sample_truncated(logits, draw, truncation, live(rows), workspace, search, config=config)


def assert_same_draws(logits: torch.Tensor, draw: DrawInputs, truncation: TruncationInputs) -> None:
    assert_agree(truncated(logits, draw, truncation), reference_sampling.sample(logits, draw, truncation))


def normal(rows: int, vocab_size: int, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * vocab_size)
    return torch.randn(rows, vocab_size, generator=generator) * spread


def assert_border(logits: torch.Tensor, rule: tuple[int, float, float], kept_ids: list[int], dropped: int) -> None:
    """The row keeps these ids: the last of them and the first dropped one each get the noise that would draw them."""
    keep = kept(logits, 1.0, *rule)
    assert keep.nonzero()[:, 0].tolist() == sorted(kept_ids)
    draw = draws([1.0, 1.0])
    draw.seed.fill_(0)
    draw.sample_index.fill_(0)
    for row, favoured in enumerate((kept_ids[-1], dropped)):
        draw.position[row] = next(
            position
            for position in range(100_000)
            if (logits.numpy() + gumbel(0, 0, position, len(logits))).argmax() == favoured
        )
    tokens, _ = truncated(logits.repeat(2, 1), draw, rules(rule, rule))
    assert int(tokens[0]) == kept_ids[-1]
    assert int(tokens[1]) in kept_ids


class TestSampleTruncated:
    @pytest.mark.parametrize(
        "rule",
        [
            (0, 1.0, 0.0),
            (1, 1.0, 0.0),
            (7, 1.0, 0.0),
            (5000, 1.0, 0.0),
            (0, 0.0, 0.0),
            (0, 0.5, 0.0),
            (0, 0.95, 0.0),
            (0, 0.9999, 0.0),
            (0, 1.0, 0.05),
            (0, 1.0, 1.0),
            (20, 0.8, 0.0),
            (3, 0.9, 0.2),
            (50, 0.99, 0.01),
        ],
    )
    def test_draws_what_sorting_draws(self, rule: tuple[int, float, float]) -> None:
        assert_same_draws(normal(2, 500), draws([0.7, 2.0], seed=rule[0]), rules(rule, rule))

    @pytest.mark.parametrize("spread", [0.01, 30.0])
    def test_flat_and_sharp_rows_are_truncated_alike(self, spread: float) -> None:
        logits = normal(4, 500, spread)
        truncation = rules((40, 1.0, 0.0), (0, 0.3, 0.0), (500, 0.7, 0.0), (0, 0.98, 0.3))
        assert_same_draws(logits, draws([1.0] * 4), truncation)

    def test_of_equal_logits_the_lowest_ids_are_kept(self) -> None:
        logits = torch.zeros(400)
        assert_border(logits, (3, 1.0, 0.0), [0, 1, 2], 3)
        logits[[100, 300, 310, 350]] = 1.0
        logits[370] = 2.0
        assert_border(logits, (3, 1.0, 0.0), [370, 100, 300], 310)

    def test_the_token_that_reaches_top_p_is_kept_and_the_next_is_not(self) -> None:
        best = [10, 300, 301, 399]
        logits = torch.full((400,), -torch.inf)
        logits[best] = 0.0
        for top_p, size in ((0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3)):
            assert_border(logits, (0, top_p, 0.0), best[:size], best[size])

    def test_top_p_shares_out_what_top_k_left_of_equal_logits(self) -> None:
        logits = torch.full((300,), -1.0)
        logits[250:] = 1.0
        assert_border(logits, (8, 0.5, 0.0), [250, 251, 252, 253], 254)

    def test_min_p_keeps_what_is_at_its_share(self) -> None:
        logits = torch.tensor([1.0, 0.0, 0.0, -1.0])
        assert_border(logits, (0, 1.0, float(np.exp(-1.0)) - 1e-6), [0, 1, 2], 3)

    def test_greedy_rows_stay_greedy(self) -> None:
        logits = normal(4, 500)
        truncation = rules((5, 1.0, 0.0), (0, 0.5, 0.0), (5, 0.5, 0.1), (0, 1.0, 0.0))
        assert torch.equal(truncated(logits, draws([0.0] * 4), truncation, ONE_SLICE)[0], logits.argmax(-1))

    def test_top_k_of_one_is_greedy_at_any_temperature(self) -> None:
        logits = normal(3, 500)
        assert torch.equal(
            truncated(logits, draws([0.1, 1.0, 50.0]), rules(*[(1, 1.0, 0.0)] * 3))[0], logits.argmax(-1)
        )

    def test_rows_that_keep_everything_draw_what_sample_logits_draws(self) -> None:
        logits = normal(3, 700)
        draw = draws([0.3, 1.0, 3.0])
        workspace = Workspace.allocate(3, 700, CPU, SMALL)
        expected = sample_logits(logits, draw, live(3), workspace, config=SMALL)
        for rule in ((0, 1.0, 0.0), (700, 1.0, 0.0)):
            actual = truncated(logits, draw, rules(rule, rule, rule))
            assert torch.equal(actual[0], expected[0])
            assert torch.equal(actual[1], expected[1])

    def test_inactive_and_padding_rows_are_left_alone(self) -> None:
        logits = normal(5, 500)
        logits[[1, 4]] = NAN
        draw = draws([1.0] * 5)
        truncation = rules(*[(4, 0.9, 0.0)] * 5)
        truncation.active[1] = 0
        workspace = Workspace.allocate(5, 500, CPU, SMALL)
        search = TruncationWorkspace.allocate(5, 500, CPU, SMALL)
        workspace.tokens.fill_(-7)
        tokens, _ = sample_truncated(logits, draw, truncation, live(4), workspace, search, config=SMALL)
        expected, _ = reference_sampling.sample(logits, draw, truncation)
        assert tokens[[0, 2, 3]].tolist() == expected[[0, 2, 3]].tolist()
        assert tokens[[1, 4]].tolist() == [-7, -7]

    def test_rows_with_different_rules_share_a_batch(self) -> None:
        logits = normal(6, 500)
        truncation = rules((0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.7, 0.0), (9, 0.7, 0.0), (0, 1.0, 0.2), (50, 0.9, 0.01))
        draw = draws([1.2] * 6)
        together = truncated(logits, draw, truncation)
        assert_agree(together, reference_sampling.sample(logits, draw, truncation))
        for row in (1, 3):
            own = slice(row, row + 1)
            alone = truncated(
                logits[own],
                DrawInputs(*(getattr(draw, field.name)[own] for field in fields(draw))),
                TruncationInputs(*(getattr(truncation, field.name)[own] for field in fields(truncation))),
            )
            assert torch.equal(alone[0], together[0][own])
            assert torch.equal(alone[1], together[1][own])

    @pytest.mark.parametrize("slice_tokens", [128, 512])
    def test_slices_do_not_change_a_draw(self, slice_tokens: int) -> None:
        logits = (normal(3, 500) * 2).round() / 2
        truncation = rules((30, 1.0, 0.0), (0, 0.6, 0.0), (60, 0.9, 0.02))
        draw = draws([1.0] * 3)
        config = replace(SMALL, slice_tokens=slice_tokens)
        assert_agree(truncated(logits, draw, truncation, config), truncated(logits, draw, truncation))

    @pytest.mark.parametrize("vocab_size", [1, 3, 256, 257])
    def test_a_vocabulary_may_end_anywhere(self, vocab_size: int) -> None:
        truncation = rules((2, 1.0, 0.0), (0, 0.6, 0.0), (3, 0.9, 0.02))
        assert_same_draws(normal(3, vocab_size), draws([1.0] * 3), truncation)

    def test_huge_infinite_and_missing_logits_do_no_harm(self) -> None:
        logits = normal(6, 400)
        logits[0] = -torch.inf
        logits[0, 390] = -3e38
        logits[1, 77] = 3e38
        logits[2, :399] = NAN
        logits[3] = NAN
        logits[4, 5] = torch.inf
        logits[5] = -torch.inf
        tokens, logprobs = truncated(
            logits, draws([1.0] * 6), rules(*[(3, 0.9, 0.1)] * 6), replace(SMALL, slice_tokens=512)
        )
        assert tokens[[0, 1, 2, 4]].tolist() == [390, 77, 399, 5]
        assert logprobs[[0, 1, 2, 4]].tolist() == [0.0] * 4
        assert all(0 <= token < 400 for token in tokens.tolist())

    @pytest.mark.parametrize("temperature", [1e-38, 1e-6])
    def test_a_tiny_temperature_is_greedy(self, temperature: float) -> None:
        logits = normal(3, 500) * 1000
        truncation = rules((5, 1.0, 0.0), (0, 0.9, 0.0), (5, 0.9, 0.1))
        assert torch.equal(truncated(logits, draws([temperature] * 3), truncation, ONE_SLICE)[0], logits.argmax(-1))


def random_penalties(rows: int, vocab_size: int, sizes: list[int]) -> PenaltyInputs:
    generator = np.random.default_rng(rows)
    ids = [generator.choice(vocab_size, size, replace=False) for size in sizes]
    total = sum(sizes)
    return PenaltyInputs(
        offsets=torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32),
        token_ids=torch.from_numpy(np.concatenate(ids)).int(),
        output_counts=torch.from_numpy(generator.integers(0, 4, total)).int(),
        repetition=torch.from_numpy(generator.uniform(0.5, 2, rows)).float(),
        frequency=torch.from_numpy(generator.uniform(-2, 2, rows)).float(),
        presence=torch.from_numpy(generator.uniform(-2, 2, rows)).float(),
    )


class TestApplyPenalties:
    def test_is_the_formula_for_the_tokens_seen_and_leaves_the_rest(self) -> None:
        logits = normal(4, 5000)
        penalties = random_penalties(4, 5000, [0, 1, 300, 4500])
        expected = logits.clone()
        reference_sampling.apply_penalties(expected, penalties)
        actual = logits.clone()
        apply_penalties(actual, penalties, live(4))
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
        assert int((actual != logits).sum()) > 4000
        assert torch.equal(actual[0], logits[0])

    def test_tokens_of_the_prompt_alone_are_only_repetitions(self) -> None:
        logits = torch.tensor([[4.0, -4.0, 4.0, 1.0]])
        one = torch.ones(1)
        ids, counts = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 0, 2], dtype=torch.int32)
        offsets = torch.tensor([0, 3], dtype=torch.int32)
        apply_penalties(
            logits,
            PenaltyInputs(
                offsets=offsets,
                token_ids=ids,
                output_counts=counts,
                repetition=one * 2,
                frequency=one * 0.25,
                presence=one * 0.125,
            ),
            live(1),
        )
        assert logits.tolist() == [[2.0, -8.0, 2.0 - 0.5 - 0.125, 1.0]]

    def test_padding_rows_and_ids_outside_the_vocabulary_are_passed_over(self) -> None:
        guarded = torch.full((4, 10), 3.0)
        penalties = PenaltyInputs(
            offsets=torch.tensor([0, 3, 5], dtype=torch.int32),
            token_ids=torch.tensor([2, -1, 10, 0, 1], dtype=torch.int32),
            output_counts=torch.ones(5, dtype=torch.int32),
            repetition=torch.ones(2),
            frequency=torch.ones(2),
            presence=torch.ones(2),
        )
        apply_penalties(guarded[1:3], penalties, live(1))
        expected = torch.full((4, 10), 3.0)
        expected[1, 2] = 1.0
        assert torch.equal(guarded, expected)

    def test_offsets_pass_31_bits(self) -> None:
        # Only the pages that are touched take memory; the dtype does not matter to an offset.
        rows, vocab_size = 9, 2**28
        logits = torch.empty(rows, vocab_size, dtype=torch.float16)
        logits[8, -1] = 8.0
        penalties = PenaltyInputs(
            offsets=torch.tensor([0] * rows + [1], dtype=torch.int32),
            token_ids=torch.tensor([vocab_size - 1], dtype=torch.int32),
            output_counts=torch.tensor([1], dtype=torch.int32),
            repetition=torch.full((rows,), 2.0),
            frequency=torch.ones(rows),
            presence=torch.zeros(rows),
        )
        apply_penalties(logits, penalties, live(rows))
        assert logits[8, -1] == 3.0


def test_the_workspace_says_what_it_takes() -> None:
    workspace = TruncationWorkspace.allocate(3, 1000, CPU, SMALL)
    taken = sum(getattr(workspace, field.name).nbytes for field in fields(workspace))
    assert taken == TruncationWorkspace.bytes(3, 1000, SMALL)
