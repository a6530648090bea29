"""Two and four ranks: the tokens of Transformers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from persimmon.server.engine.loading import LoadedModel
from tests.model import transformers_reference
from tests.model.checkpoints import make_checkpoint
from tests.model.test_parity import random_prompts
from tests.model.transformers_reference import GreedyReference
from tests.ranks import harness_on, on_ranks

NEW_TOKENS = 32
HEADS: dict[str, Any] = {"num_attention_heads": 4, "vocab_size": 4099}
"""No number of ranks divides this vocabulary."""

PROMPTS = list(random_prompts())[:10]


@pytest.fixture(scope="module")
def four_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("four-heads"), **HEADS)


@pytest.fixture(scope="module")
def expected(four_heads: Path) -> GreedyReference:
    transformers = transformers_reference.load(four_heads)
    sure = transformers_reference.continue_greedily(transformers, PROMPTS, NEW_TOKENS).without_near_ties()
    assert len(sure.prompts) >= len(PROMPTS) // 2
    return sure


@pytest.fixture(scope="module", params=[2, 4])
def loaded(four_heads: Path, request: pytest.FixtureRequest) -> Iterator[LoadedModel]:
    with on_ranks(request.param, four_heads) as loaded:
        yield loaded


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_num_batched_tokens": 9, "max_num_seqs": 9},
        {"num_blocks": 30, "prefix_caching": True, "typical_output": 1, "overlap": True},
    ],
    ids=["side by side", "in chunks", "preempted and overlapping"],
)
def test_greedy_tokens_equal_transformers(
    loaded: LoadedModel, expected: GreedyReference, limits: dict[str, Any]
) -> None:
    harness = harness_on(loaded, **limits)
    assert harness.outputs(expected.prompts, NEW_TOKENS) == expected.outputs
    assert bool(harness.stats.preemptions) == ("num_blocks" in limits)
