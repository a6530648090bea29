"""The measurement of several engines, in small."""

from argparse import Namespace
from typing import Any

import pytest

from benchmarks import scale_out
from benchmarks.routed_conversations import Conversations, run
from benchmarks.scale_out import describe, measure_hits, measure_router

FEW = Conversations(count=6, turns=3)


@pytest.mark.parametrize("engines", [1, 2])
def test_every_turn_is_asked_once_and_no_more_is_cached_than_there_is(engines: int) -> None:
    hits = run(FEW, engines, 2 * FEW.final_blocks)
    assert sum(hits.requests) == FEW.count * FEW.turns
    assert len(hits.requests) == engines
    assert 0.2 < hits.share < 1


def test_the_same_is_asked_of_any_number_of_engines() -> None:
    results = [run(FEW, engines, 4 * FEW.final_blocks, round_robin=True) for engines in (1, 2, 3)]
    assert len({hits.prompt_tokens for hits in results}) == 1
    assert results[0].cached_tokens > results[1].cached_tokens > 0


def test_figures_are_compared_and_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_out, "PROMPT_LENGTHS", (64,))
    monkeypatch.setattr(scale_out, "KNOWN_BLOCKS", 100)
    monkeypatch.setattr(scale_out, "REPEATS", 1)
    arguments = Namespace(conversations=4, turns=3, memory=2.0, engines=[2])
    measured: dict[str, Any] = {"hits": measure_hits(arguments), "router": measure_router(arguments)}
    (hits,) = measured["hits"]["engines"]
    assert hits["share"] >= hits["round_robin_share"]
    (cost,) = measured["router"]
    assert (cost["engines"], cost["prompt_tokens"]) == (2, 64)
    assert cost["miss_us"] > 0
    assert "of one engine's; round robin" in describe(measured)
