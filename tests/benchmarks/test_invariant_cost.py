"""What the batch-invariant mode is predicted to cost."""

import sys

import pytest

from benchmarks import invariant_cost
from benchmarks.floors import PERSIMMON_8B
from benchmarks.invariant_cost import Rates, decode_cost, prompt_cost

FAST_CACHE = Rates(copy=3e12, l2=1e15, matmul=640e12)
SLOW_CACHE = Rates(copy=3e12, l2=5.5e12, matmul=640e12)


def test_small_decodes_pay_for_launches_and_prompts_for_what_their_tiles_read() -> None:
    assert 1 < decode_cost(PERSIMMON_8B, 64, 512, SLOW_CACHE).factor < 1.05
    assert prompt_cost(PERSIMMON_8B, 2048, FAST_CACHE).factor < 1.05
    assert prompt_cost(PERSIMMON_8B, 2048, SLOW_CACHE).factor > 1.5


def test_the_table_says_that_it_is_predicted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["invariant_cost"])
    invariant_cost.main()
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("predicted")
    assert len(rows) == len(invariant_cost.costs(SLOW_CACHE))
