"""What requests change in logits: each row as it asked, and what is reported is the network's own opinion."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persimmon.kernels import reference_sampling
from persimmon.kernels.operands import PenaltyInputs
from persimmon.model.adjustments import adjust_, penalize
from persimmon.model.row_sampling import RowSampling
from persimmon.model.sampler import sample
from persimmon.model.token_counts import TokenCounts
from tests.model.rows import changed, row_with

VOCAB_SIZE = 70
TOKENS = st.integers(0, VOCAB_SIZE - 1)


def counts(prompt: Sequence[int], output: Sequence[int]) -> TokenCounts:
    seen = TokenCounts(prompt)
    for token in output:
        seen.append(token)
    return seen


def words(allowed: set[int]) -> np.ndarray:
    """Tokens as the bits of a mask, which has more of them than there are tokens."""
    bits = np.zeros(-(-VOCAB_SIZE // 32) * 32, dtype=np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


@settings(deadline=None)
@given(prompt=st.lists(TOKENS, max_size=40), output=st.lists(TOKENS, max_size=60))
def test_counts_are_of_distinct_tokens_and_of_the_output_alone(prompt: list[int], output: list[int]) -> None:
    seen = counts(prompt, output)
    found = dict(zip(seen.token_ids.tolist(), seen.output_counts.tolist(), strict=True))
    assert len(found) == len(seen.token_ids)
    assert found == {token: Counter(output)[token] for token in {*prompt, *output}}
    assert seen.output_length == len(output)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(
        st.tuples(st.lists(TOKENS, max_size=12), st.lists(TOKENS, max_size=12), *[st.floats(0.1, 2)] * 3),
        min_size=1,
        max_size=5,
    )
)
def test_penalties_are_the_references(rows: list[tuple[list[int], list[int], float, float, float]]) -> None:
    params = [
        row_with(
            repetition_penalty=repetition,
            frequency_penalty=frequency,
            presence_penalty=presence - 1,
            seen=counts(prompt, output),
        )
        for prompt, output, repetition, frequency, presence in rows
    ]
    taken: list[PenaltyInputs] = []
    logits = random_logits(len(rows))
    expected = logits.clone()

    def penalize_and_note(logits: torch.Tensor, penalties: PenaltyInputs) -> None:
        taken.append(penalties)
        penalize(logits, penalties)

    adjust_(logits, params, penalize_and_note)
    reference_sampling.apply_penalties(expected, taken[0])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def test_penalties_follow_their_definition() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0, 1.0]])
    params = row_with(
        repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.5, seen=counts([0, 1], [2, 3, 3])
    )
    adjust_(logits, [params], penalize)
    # Only in the prompt: only repetition; in the output: a quarter for each time and half for the first.
    assert logits.tolist() == [[1.0, -4.0, 1.0 - 0.75, -4.0 - 1.0, 1.0]]


@pytest.mark.parametrize(
    ("logit", "bias", "repetition", "expected"),
    [
        # A bias that changes the sign turns a multiplication into a division, and the other way round.
        (-4.0, 10.0, 2.0, 3.0),
        (4.0, -10.0, 2.0, -12.0),
        (4.0, -4.0, 2.0, 0.0),
        (-4.0, 10.0, 0.5, 12.0),
        (1.0, 1.0, 2.0, 1.0),
    ],
)
def test_a_bias_comes_before_the_penalties(logit: float, bias: float, repetition: float, expected: float) -> None:
    logits = torch.tensor([[logit, 0.5]])
    params = row_with(repetition_penalty=repetition, seen=counts([0], []), logit_bias={0: bias})
    adjust_(logits, [params], penalize)
    assert logits.tolist() == [[expected, 0.5]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "ruled_out",
    [
        row_with(banned=(7,)),
        row_with(allowed=lambda: words({1, 2, 3})),
        row_with(banned=(7,), seen=counts([7], [7, 7]), repetition_penalty=0.1, frequency_penalty=-2.0),
    ],
    ids=["a ban", "a grammar", "a ban of a token that penalties favour"],
)
def test_no_bias_beats_a_ban(ruled_out: RowSampling, temperature: float) -> None:
    logits = random_logits(20)
    params = [changed(ruled_out, temperature=temperature, seed=row, logit_bias={7: 100.0}) for row in range(20)]
    assert 7 not in sample(logits, params).tokens.tolist()


def test_each_row_is_changed_as_it_asked_and_in_order() -> None:
    params = [
        row_with(),
        row_with(seen=counts([], [3]), frequency_penalty=1.0, logit_bias={3: 5.0, 69: -math.inf}),
        row_with(banned=(0, 69), logit_bias={0: 100.0}),
        row_with(allowed=lambda: words({2, 3, 5, 69})),
        row_with(allowed=lambda: words({4, 6}), banned=(4,)),
    ]
    logits = random_logits(len(params))
    expected = logits.clone()
    expected[1, 3] += 5.0 - 1.0
    expected[1, 69] = -math.inf
    expected[2, [0, 69]] = -math.inf
    expected[3, [token for token in range(VOCAB_SIZE) if token not in (2, 3, 5, 69)]] = -math.inf
    expected[4, [token for token in range(VOCAB_SIZE) if token != 6]] = -math.inf
    adjust_(logits, params, penalize)
    torch.testing.assert_close(logits, expected)


SETTINGS = [
    row_with(logprobs=0),
    row_with(temperature=1.0, seed=3, logprobs=4),
    row_with(logit_bias={7: 90.0}, logprobs=2),
    row_with(temperature=0.7, seed=1, banned=tuple(range(40)), top_k=5),
    row_with(temperature=1.4, seed=2, seen=counts([1], [2, 2, 9]), frequency_penalty=2.0, top_p=0.9, logprobs=1),
    row_with(temperature=1.0, seed=4, allowed=lambda: words({1, 2, 33, 64})),
    row_with(),
]


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6], [6, 4, 2, 0, 5, 3, 1], [5, 3]])
def test_a_rows_token_does_not_depend_on_what_others_ask_for(order: list[int]) -> None:
    logits = random_logits(len(SETTINGS), seed=5)
    alone = [sample(logits[row : row + 1], [own]) for row, own in enumerate(SETTINGS)]
    together = sample(logits[order], [SETTINGS[row] for row in order])
    assert together.tokens.tolist() == [int(alone[row].tokens) for row in order]
    assert [order[row] for row in together.reported] == [
        row for row in order if SETTINGS[row].asked.logprobs is not None
    ]


def test_what_the_network_said_is_left_as_it_was() -> None:
    logits = random_logits(len(SETTINGS))
    before = logits.clone()
    sample(logits, SETTINGS)
    assert torch.equal(logits, before)


def test_logprobs_are_those_of_the_network_and_not_of_what_was_drawn_from() -> None:
    logits = random_logits(len(SETTINGS), seed=9)
    samples = sample(logits, SETTINGS)
    assert samples.logprobs is not None
    tops = [SETTINGS[row].asked.logprobs or 0 for row in samples.reported]
    for row, top, entry in zip(samples.reported, tops, samples.logprobs.fetch(tops), strict=True):
        own = logits[row].double().log_softmax(-1)
        assert entry.token_id == int(samples.tokens[row])
        assert entry.logprob == pytest.approx(float(own[entry.token_id]), abs=1e-5)
        assert entry.top_ids == own.topk(top).indices.tolist()
        assert entry.top_logprobs == pytest.approx(own.topk(top).values.tolist(), abs=1e-5)
    assert int(samples.tokens[2]) == 7


def test_equally_probable_tokens_are_reported_lowest_id_first() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [3, 40, 69]] = 2.0
    samples = sample(logits, [row_with(logprobs=3)])
    assert samples.logprobs is not None
    (entry,) = samples.logprobs.fetch([3])
    assert entry.top_ids == [3, 40, 69]


def test_more_rows_than_are_reported_at_once_are_all_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(9)
    params = [row_with(temperature=1.0, seed=row, logprobs=row % 3) for row in range(9)]
    whole = sample(logits, params)
    monkeypatch.setattr("persimmon.model.sampler._LOGITS_AT_ONCE", 2 * VOCAB_SIZE)
    parts = sample(logits, params)
    assert whole.logprobs is not None
    assert parts.logprobs is not None
    tops = [own.asked.logprobs or 0 for own in params]
    assert parts.tokens.tolist() == whole.tokens.tolist()
    assert parts.logprobs.fetch(tops) == whole.logprobs.fetch(tops)


def test_the_draw_of_a_row_whose_every_token_is_ruled_out_is_still_a_token() -> None:
    nothing = row_with(banned=tuple(range(VOCAB_SIZE)))
    drawn = changed(nothing, temperature=1.0)
    tokens = sample(random_logits(2), [nothing, drawn]).tokens
    assert all(0 <= token < VOCAB_SIZE for token in tokens.tolist())
