"""An engine of two ranks, this process and another: the tokens of one rank, however they run.

tests/distributed compares two and four ranks with Transformers, and has other kinds of checkpoints.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from persimmon.kernels import KernelsUnavailableError
from persimmon.kernels.cpu import library
from persimmon.model.config import PersimmonConfig
from persimmon.model.errors import CheckpointError
from persimmon.model.grammar import GrammarCompiler
from persimmon.model.patches import PatchSpan
from persimmon.model.ranks import DistributedRanks, bytes_of_step
from persimmon.model.runner import PooledStates, SequenceInput
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.config import read_settings
from persimmon.server.engine import rank_cores
from persimmon.server.engine.loading import LoadedModel
from persimmon.server.engine.rank_messages import RankStep
from persimmon.server.served_model import ServedModel
from tests.engine_harness import CPU, Harness, load_model, new_tokens
from tests.model.rows import row_with
from tests.model.test_parity import dialogues
from tests.ranks import harness_on, on_ranks
from tests.server.engine.test_speculation import Answers, answers, families, speculation

NEW_TOKENS = 16
PROMPTS = 6


@dataclass(frozen=True)
class Case:
    """The demo on two ranks, and what one rank makes of prompts for it."""

    loaded: LoadedModel
    prompts: list[list[int]]
    outputs: list[list[int]]
    tokenizer: Tokenizer
    grammars: GrammarCompiler

    def families(self) -> list[Any]:
        return families(self.tokenizer, frozenset(self.loaded.executor.model.config.eos_token_ids))


@pytest.fixture(scope="module")
def case(demo_checkpoint: Path) -> Iterator[Case]:
    prompts, alone = list(dialogues())[:PROMPTS], load_model(demo_checkpoint)
    tokenizer, config = Tokenizer.from_folder(demo_checkpoint), PersimmonConfig.from_folder(demo_checkpoint)
    with on_ranks(2, demo_checkpoint) as loaded:
        yield Case(
            loaded=loaded,
            prompts=prompts,
            outputs=Harness(alone, num_blocks=200).outputs(prompts, NEW_TOKENS),
            tokenizer=tokenizer,
            grammars=GrammarCompiler.for_tokenizer(tokenizer, config.vocab_size, config.eos_token_ids),
        )


@pytest.fixture(scope="module")
def plain(case: Case) -> Answers:
    """What all kinds of requests get on two ranks, without guesses."""
    return answers(harness_on(case.loaded, grammars=case.grammars), case.families())


@pytest.mark.parametrize(
    ("limits", "preempts"),
    [
        ({}, False),
        ({"max_num_batched_tokens": 7, "max_num_seqs": 7}, False),
        ({"num_blocks": 19, "prefix_caching": True, "typical_output": 1}, True),
        ({"overlap": True, "max_num_batched_tokens": 48, "prefix_caching": True}, False),
    ],
    ids=["side by side", "in chunks", "preempted", "overlapping"],
)
def test_greedy_tokens_are_those_of_one_rank(case: Case, limits: dict[str, Any], preempts: bool) -> None:
    harness = harness_on(case.loaded, **limits)
    assert harness.outputs(case.prompts, NEW_TOKENS) == case.outputs
    assert bool(harness.stats.preemptions) == preempts
    if limits.get("prefix_caching"):
        again = harness.generate(case.prompts, NEW_TOKENS)
        assert [new_tokens(own) for own in again] == case.outputs
        assert preempts or any(own.cached_tokens for own in again)


def test_draws_samples_grammars_and_reports_are_those_of_one_rank(
    case: Case, plain: Answers, demo_checkpoint: Path
) -> None:
    alone = answers(Harness(load_model(demo_checkpoint), num_blocks=200, grammars=case.grammars), case.families())
    assert alone.keys() == plain.keys()
    for key, (tokens, reason, logprobs, of_prompt) in alone.items():
        theirs = plain[key]
        assert (key, theirs[:2]) == (key, (tokens, reason))
        for mine, other in zip(logprobs + of_prompt, theirs[2] + theirs[3], strict=True):
            assert mine.token_id == other.token_id
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.skipif(not library.builds(), reason="without the C kernels a row's bits depend on the batch")
@pytest.mark.parametrize(
    ("kind", "limits"),
    [
        ("half right", {"overlap": True}),
        ("hostile", {"num_blocks": 40, "max_num_batched_tokens": 64, "max_num_seqs": 9}),
    ],
)
def test_answers_have_the_same_bits_with_guesses_and_in_other_batches(
    case: Case, plain: Answers, kind: str, limits: dict[str, Any]
) -> None:
    guessing = speculation(kind, plain, case.loaded.executor.model.config.vocab_size)
    harness = harness_on(case.loaded, grammars=case.grammars, speculation=guessing, **limits)
    assert answers(harness, case.families()) == plain
    assert harness.stats.draft_tokens > 0


def test_states_are_those_of_one_rank(case: Case, demo_checkpoint: Path) -> None:
    alone = Harness(load_model(demo_checkpoint), num_blocks=8)._run
    step = [SequenceInput(range(2, 22), 0, [0, 1], (), PooledStates(range(20), total=True))]
    (mine,) = case.loaded.runner.launch(step).wait().pooled.values()
    (theirs,) = alone._runner.launch(step).wait().pooled.values()  # type: ignore[attr-defined]
    assert len(mine) == len(theirs) > 0
    np.testing.assert_allclose(np.frombuffer(mine, "<f4"), np.frombuffer(theirs, "<f4"), atol=1e-3)


def test_a_step_sends_as_many_bytes_as_the_formula_says(case: Case) -> None:
    model = case.loaded.executor.model
    ranks = model.ranks
    assert isinstance(ranks, DistributedRanks)
    steps = {
        # Tokens of a step, and rows that logits are made for.
        (41, 2): [
            SequenceInput(range(2, 42), 0, [0, 1, 2], (row_with(),)),
            SequenceInput([7], 0, [3], (row_with(),)),
        ],
        (1, 1): [SequenceInput([5], 40, [0, 1, 2], (row_with(),))],
        (20, 0): [SequenceInput(range(2, 22), 0, [4, 5], ())],
    }
    for (tokens, rows), batch in steps.items():
        before = ranks.bytes_sent
        case.loaded.runner.run(batch)
        expected = bytes_of_step(model.config, ranks.shard, tokens=tokens, logits_rows=rows, itemsize=4)
        assert ranks.bytes_sent - before == expected


def test_a_rank_has_its_part_of_weights_and_cache(case: Case, demo_checkpoint: Path) -> None:
    whole, part = load_model(demo_checkpoint), case.loaded.executor.model
    for mine, theirs in zip(part.layers, whole.layers, strict=True):
        assert 2 * mine.query_key_value.weight.nbytes == theirs.query_key_value.weight.nbytes
        assert 2 * mine.attention_out.weight.nbytes == theirs.attention_out.weight.nbytes
        assert 2 * mine.mlp_up.weight.nbytes == theirs.mlp_up.weight.nbytes
        assert 2 * mine.mlp_down.weight.nbytes == theirs.mlp_down.weight.nbytes
    assert 2 * part.head.nbytes == whole.head.nbytes
    cache, plan = case.loaded.executor.cache, case.loaded.plan
    assert 2 * sum(tensor.nbytes for tensor in cache.tensors) == plan.kv_cache
    assert cache.device == CPU
    assert case.loaded.device.endswith(", 2 ranks")


class TestRefusals:
    def test_sizes_that_do_not_divide_the_heads(self) -> None:
        with pytest.raises(CheckpointError) as raised:
            ServedModel.find(read_settings({"tensor_parallel_size": "3"}), api_workers=1)
        assert str(raised.value) == (
            "--tensor-parallel-size is 3, which does not divide this model's 4 attention heads and the MLP's 1024 "
            "inner values; expected 1 or 2 or 4"
        )

    def test_more_ranks_than_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rank_cores, "usable_cores", lambda: 3)
        with pytest.raises(KernelsUnavailableError) as raised:
            rank_cores.cores_of_ranks(4, CPU)
        assert str(raised.value) == (
            "--tensor-parallel-size is 4, but the engine may use 3 cores, and each rank needs one: give at most 3"
        )


def test_patches_reach_the_other_ranks() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 12)
    item = SequenceInput([1, 7, 7], 0, [0], (), patches=[PatchSpan(1, pixels)])
    message = msgspec.msgpack.encode(RankStep.of([item]))
    (received,) = msgspec.msgpack.decode(message, type=RankStep).sequences
    ((start, sent),) = ((span.start, span.pixels) for span in received.input.patches)
    assert start == 1
    assert np.array_equal(sent, pixels)


def test_ranks_divide_cores_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(rank_cores, "usable_cores", lambda: 6)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    parts = rank_cores.cores_of_ranks(3, CPU)
    assert [part.threads for part in parts] == [2, 2, 2]
    assert sorted(core for part in parts for core in part.cores) == list(range(6))
    # A control group leaves it the time of six cores among many.
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    assert [(part.cores, part.threads) for part in rank_cores.cores_of_ranks(3, CPU)] == [(frozenset(), 2)] * 3
