"""The path of a GPU on a CPU: the network through Triton's interpreter, on fixed buffers and padded batches.

What is captured on a GPU is here launched anew for each step, from the same buffers.
"""

import json
import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from persimmon.kernels import reference, reference_sampling
from persimmon.kernels.fused import SMALL_STEP, FusedKernels
from persimmon.kernels.fused_weight import DequantizingBuffer, FusedWeight
from persimmon.kernels.operands import DrawInputs, TruncationInputs
from persimmon.model.config import PersimmonConfig
from persimmon.model.fused_sampler import FusedSampler
from persimmon.model.graph_sizes import default_sizes, graph_bytes
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import Runner, SequenceInput
from persimmon.model.sampler import Samples
from persimmon.model.token_counts import TokenCounts
from tests.engine_harness import CPU, poisoned_cache, runner_of
from tests.interpreter import keep_language_patched, multiply_as_matrix_units
from tests.model import transformers_reference
from tests.model.fused_steps import (
    BLOCK_SIZE,
    GREEDY,
    MAX_MODEL_LEN,
    NEW_TOKENS,
    VOCAB_SIZE,
    Fused,
    assert_same_bits,
    at_position,
    generate,
    limits,
    load,
    prompts,
    scattered_tables,
    tiny_checkpoint,
)
from tests.model.rows import row_with

DRAWN = row_with(temperature=1.0, seed=7)


@pytest.fixture(autouse=True)
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_language_patched()
    multiply_as_matrix_units(monkeypatch)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("two-layers"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, for what has nothing to do with their number: the interpreter takes seconds for a step."""
    return tiny_checkpoint(tmp_path_factory.mktemp("one-layer"), num_hidden_layers=1)


def reference_tokens(logits: torch.Tensor, params: Sequence[RowSampling]) -> list[int]:
    """A token for each row of logits, by the definition of a draw."""
    zeros = torch.zeros(len(params), dtype=torch.int32)
    draw = DrawInputs(
        temperature=torch.tensor([own.asked.temperature for own in params]),
        seed=torch.tensor([own.asked.seed for own in params]),
        sample_index=torch.tensor([own.sample_index for own in params]),
        position=torch.tensor([own.position for own in params]),
        wants_logits=zeros,
    )
    truncation = TruncationInputs(
        active=zeros,
        top_k=torch.tensor([own.asked.top_k for own in params]),
        top_p=torch.tensor([own.asked.top_p for own in params], dtype=torch.float64),
        min_p=torch.tensor([own.asked.min_p for own in params], dtype=torch.float64),
    )
    tokens, _ = reference_sampling.sample(logits, draw, truncation)
    return tokens.tolist()


def reference_runner(folder: Path) -> Runner:
    """The same network in plain torch, with a cache of its own."""
    model = load(folder, reference, torch.float32)
    return runner_of(model, poisoned_cache(model, 8 * MAX_MODEL_LEN // BLOCK_SIZE, BLOCK_SIZE), reference)


def greedily(folder: Path, asked: Sequence[list[int]]) -> list[list[int]]:
    """What the network in plain torch makes of prompts, greedily."""
    runner = reference_runner(folder)
    return generate(runner, scattered_tables(runner._cache), asked, [GREEDY] * len(asked))


@pytest.mark.parametrize("quantized", [False, True])
def test_buffers_take_what_was_announced(shallow: Path, quantized: bool) -> None:
    kernels = FusedKernels(CPU)
    for max_num_seqs in (1, 24):
        largest = replace(limits(PersimmonConfig.from_folder(shallow), max_num_seqs), quantized=quantized)
        kernels.reserve(largest)
        assert held_bytes(kernels._reserved) == kernels.workspace_bytes(largest)


def held_bytes(held: Any) -> int:
    """Of every tensor within dataclasses and tuples."""
    if held is None:
        return 0
    if isinstance(held, torch.Tensor | DequantizingBuffer):
        return held.nbytes
    parts = held if isinstance(held, tuple) else [getattr(held, part.name) for part in fields(held)]
    return sum(held_bytes(part) for part in parts)


class TestTokens:
    def test_are_those_of_the_reference_and_of_transformers(self, checkpoint: Path) -> None:
        # Chunks of every kind together with decodes: one tile, several, longer than a split of the decode kernel.
        asked = prompts(5, 20, 17, 260)
        fused = Fused(checkpoint).generate(asked)
        assert fused == greedily(checkpoint, asked)
        transformers = transformers_reference.load(checkpoint)
        assert fused == transformers_reference.continue_greedily(transformers, asked, NEW_TOKENS).outputs

    def test_of_a_prompt_in_chunks_beside_decodes_are_those_of_the_whole_prompt(self, shallow: Path) -> None:
        long, short = prompts(70, 4)
        expected = greedily(shallow, [long, short])
        fused = Fused(shallow)
        outputs: list[list[int]] = [[], []]
        for start, end in ((0, 33), (33, 40), (40, 70)):  # of several tiles, of one, with most of the context cached
            known = [*short, *outputs[1]]
            decode = SequenceInput(known, 0, fused.tables[1], (GREEDY,))
            if outputs[1]:
                decode = SequenceInput(known[-1:], len(known) - 1, fused.tables[1], (GREEDY,))
            chunk = SequenceInput(long[start:end], start, fused.tables[0], (GREEDY,) if end == 70 else ())
            *first, token = fused.runner.run([chunk, decode])
            outputs[0] += first
            outputs[1].append(token)
        assert outputs == [expected[0][:1], expected[1]]

    def test_of_a_prompt_whose_length_decides_its_frequencies_are_the_reference_s(
        self, shallow: Path, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(shallow, tmp_path / "dynamic")
        config = json.loads((folder / "config.json").read_text())
        config |= {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}
        (folder / "config.json").write_text(json.dumps(config))
        prompt = random.Random(3).choices(range(VOCAB_SIZE), k=40)
        table = [3, 1, 2]
        tokens = []
        for runner in (Fused(folder).runner, reference_runner(folder)):
            # A chunk, a single token, a chunk; then steps of single tokens, which are on fixed buffers.
            for start, end in ((0, 24), (24, 25), (25, 40)):
                samplings = (GREEDY,) if end == 40 else ()
                part = prompt[start:end]
                made = runner.run([SequenceInput(part, start, table, samplings, prompt_length=len(prompt))])
            for position in range(1, NEW_TOKENS):
                made += runner.run([SequenceInput(made[-1:], 39 + position, table, (at_position(GREEDY, position),))])
            tokens.append(made)
        assert tokens[0] == tokens[1]

    def test_come_from_the_reference_s_logits_where_several_decodes_and_chunks_meet(self, shallow: Path) -> None:
        fused = Fused(shallow)
        runner = reference_runner(shallow)
        known, more = prompts(3, 20, 18, 18), prompts(5, 4)
        first = [SequenceInput(tokens, 0, table, (GREEDY,)) for tokens, table in zip(known, fused.tables, strict=False)]
        # In the order that `run` would use.
        parts = [([7], 3, 0), ([8], 18, 2), ([9], 20, 1), (more[0], 0, 4), (more[1], 18, 3)]
        second = [SequenceInput(tokens, start, fused.tables[i], (GREEDY,)) for tokens, start, i in parts]
        for batch in (first, second):
            torch.testing.assert_close(fused.runner.logits(batch), runner.logits(batch), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("count", [SMALL_STEP, SMALL_STEP + 1])
    def test_come_from_the_reference_s_logits_on_both_sides_of_a_small_step(self, shallow: Path, count: int) -> None:
        fused = Fused(shallow)
        (prompt,) = prompts(count)
        batch = [SequenceInput(prompt, 0, fused.tables[0], (GREEDY,))]
        expected = reference_runner(shallow).logits(batch)
        torch.testing.assert_close(fused.runner.logits(batch), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(("dtype", "largest_error"), [(torch.float16, 0.01), (torch.bfloat16, 0.06)])
    def test_in_16_bits_come_from_logits_close_to_float32_s(
        self, checkpoint: Path, dtype: torch.dtype, largest_error: float
    ) -> None:
        (prompt,) = prompts(40)
        fused, exact = Fused(checkpoint, dtype), reference_runner(checkpoint)
        # The prompt, then a single token.
        for tokens, start in ((prompt, 0), ([11], 40)):
            batch = [SequenceInput(tokens, start, fused.tables[0], (GREEDY,))]
            expected, actual = exact.logits(batch), fused.runner.logits(batch)
            assert (actual - expected).abs().max() < largest_error * expected.abs().max()


class TestLaunches:
    def test_of_a_layer_are_five_up_to_16_rows(
        self, shallow: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        launched = [0]

        def counted(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
            launched[0] += 1

        def launches(folder: Path, rows: int) -> int:
            fused = Fused(folder, sizes=[rows])
            launched[0] = 0
            fused.runner.launch([SequenceInput([3], 0, [row], (GREEDY,)) for row in range(rows)])
            return launched[0]

        monkeypatch.setattr(GridExecutor, "__call__", counted)
        # With more rows each of the two norms has a launch of its own.
        for rows, expected in ((16, 5), (17, 7)):
            assert launches(checkpoint, rows) - launches(shallow, rows) == expected


def test_mlp_rows_that_meet_only_zeros_are_not_read(shallow: Path) -> None:
    logits = []
    for what_lies_there in (0.0, float("nan")):
        fused = Fused(shallow)
        (layer,) = fused.model.layers
        assert layer.mlp_up.bias is not None
        layer.mlp_up.bias[:96] = -1e4
        layer.mlp_down.weight.matrix[:96] = what_lies_there
        logits.append(fused.runner.logits([SequenceInput([3], 0, fused.tables[0], (GREEDY,))]))
    assert logits[1].isfinite().all()
    assert torch.equal(*logits)


class TestPadding:
    def test_changes_no_bit_of_a_live_row(self, shallow: Path) -> None:
        lengths = (3, 20, 30)
        exact = Fused(shallow, torch.float16, [3])
        expected = exact.decode(lengths)
        for size in (4, 24):
            padded = Fused(shallow, torch.float16, [size])
            assert padded.decode(lengths) == expected
            assert_same_bits(exact, padded)

    def test_writes_to_no_block_of_a_sequence_that_has_left(self, shallow: Path) -> None:
        fused = Fused(shallow, sizes=[2])
        stays, leaves = (SequenceInput([3], 0, table, (GREEDY,)) for table in fused.tables[:2])
        # Twice each, because two buffers on the host take turns.
        for _ in range(2):
            fused.runner.run([stays, leaves])
        for tensor in fused.caches:
            tensor[fused.tables[1]] = float("nan")
        for _ in range(2):
            fused.runner.run([stays])
        for tensor in fused.caches:
            assert tensor[fused.tables[1]].isnan().all()

    def test_writes_to_no_block(self, shallow: Path) -> None:
        fused = Fused(shallow, sizes=[4])
        fused.generate(prompts(3))
        free = [block for table in fused.tables[1:] for block in table]
        for tensor in fused.caches:
            assert tensor[free].isnan().all()


def test_a_row_has_the_same_bits_alone_and_among_others(shallow: Path) -> None:
    """As many others as make a different tile of the kernels, too."""
    alone, among = Fused(shallow, torch.float16, [1]), Fused(shallow, torch.float16, [20])
    assert alone.decode([20]) == among.decode([20], others=19)
    for own_cache, shared_cache in zip(alone.caches, among.caches, strict=True):
        torch.testing.assert_close(
            own_cache[alone.tables[0]], shared_cache[among.tables[0]], rtol=0, atol=0, equal_nan=True
        )


class TestTokensThatTheHostHasNotSeen:
    @pytest.mark.parametrize("sizes", [[1, 4], []], ids=["fixed buffers", "eager"])
    def test_feed_the_next_steps(self, shallow: Path, sizes: list[int]) -> None:
        asked = prompts(3, 20, 1)
        expected = greedily(shallow, asked)
        fused = Fused(shallow, sizes=sizes)
        pending = [
            fused.runner.launch([SequenceInput(p, 0, t, (GREEDY,)) for p, t in zip(asked, fused.tables, strict=False)])
        ]
        for step in range(1, NEW_TOKENS):
            # In another order than the step before, so that it matters which token is meant.
            order = [0, 1, 2] if step % 2 == 0 else [2, 0, 1]
            before = [0, 1, 2] if step % 2 else [2, 0, 1]
            batch = [
                SequenceInput([-1 - before.index(i)], len(asked[i]) + step - 1, fused.tables[i], (GREEDY,))
                for i in order
            ]
            pending.append(fused.runner.launch(batch))
        outputs: list[list[int]] = [[], [], []]
        for step, tokens in enumerate(pending):
            order = [0, 1, 2] if step % 2 == 0 else [2, 0, 1]
            for i, (token,) in zip(order, tokens.wait().tokens, strict=True):
                outputs[i].append(token)
        assert outputs == expected

    def test_may_come_from_prompts_and_feed_a_step_with_prompts(self, shallow: Path) -> None:
        asked = prompts(18, 25)
        expected = greedily(shallow, asked[:1])[0][:2]
        fused = Fused(shallow)
        first = fused.runner.launch([SequenceInput(asked[0], 0, fused.tables[0], (GREEDY,))])
        both = fused.runner.launch(
            [
                SequenceInput(asked[1], 0, fused.tables[1], (GREEDY,)),
                SequenceInput([-1], 18, fused.tables[0], (GREEDY,)),
            ]
        )
        assert [*first.wait().tokens[0], *both.wait().tokens[1]] == expected


class TestDraws:
    @pytest.mark.parametrize("sizes", [[4], []], ids=["fixed buffers", "eager"])
    def test_follow_every_setting_of_their_row(self, shallow: Path, sizes: list[int]) -> None:
        params = [
            row_with(temperature=3.0, seed=2**40 + 3, sample_index=2, position=5),
            row_with(temperature=3.0, seed=3, sample_index=5, position=2, top_k=2),
            row_with(temperature=3.0, seed=3, top_p=0.02),
            row_with(temperature=3.0, seed=4, position=1, min_p=0.95),
        ]
        fused = Fused(shallow, sizes=sizes)
        # Other settings before these, in the buffers that take turns on the host.
        others = [row_with(temperature=0.5, seed=9, top_k=7, top_p=0.5, min_p=0.1, position=8)] * 4
        for own in (*[others] * (2 if sizes else 0), params):
            batch = [SequenceInput([9 + i], 0, fused.tables[i], (row,)) for i, row in enumerate(own)]
            tokens = fused.runner.run(batch)
        assert tokens == reference_tokens(fused.runner.logits(batch), params)

    def test_of_more_rows_than_a_small_step_are_the_reference_s(self, shallow: Path) -> None:
        rows = SMALL_STEP + 1
        kernels = FusedKernels(CPU)
        kernels.reserve(limits(PersimmonConfig.from_folder(shallow), rows))
        chooser = torch.Generator().manual_seed(6)
        hidden, head = (torch.randn(count, 64, generator=chooser) / 4 for count in (rows, VOCAB_SIZE))
        params = [row_with(temperature=1.0, seed=row, top_k=2 if row % 16 == 0 else 0) for row in range(rows)]
        samples = FusedSampler(kernels, FusedWeight(head))(hidden, params)
        assert samples.tokens.tolist() == reference_tokens(hidden @ head.t(), params)

    @pytest.mark.parametrize("sizes", [[6], []], ids=["fixed buffers", "eager"])
    def test_come_from_the_logits_that_their_row_asks_for(self, shallow: Path, sizes: list[int]) -> None:
        seen = TokenCounts([4, 5])
        for token in (6, 6, 7):
            seen.append(token)
        even = np.array([0x55555555] * -(-VOCAB_SIZE // 32), dtype=np.uint32).view(np.int32)
        params = [
            row_with(temperature=3.0, seed=1, logit_bias={5: 4.0, VOCAB_SIZE - 1: 5.0}, logprobs=3),
            row_with(banned=(0, 1, 2)),
            row_with(temperature=3.0, seed=2, seen=seen, repetition_penalty=1.5, frequency_penalty=0.5, logprobs=0),
            row_with(allowed=lambda: even, logprobs=1),
            row_with(temperature=2.0, seed=5, top_k=3, seen=seen, presence_penalty=-1.0, allowed=lambda: even),
            row_with(logprobs=2),
            # A bias that changes a logit's sign decides whether the repetition penalty divides or multiplies it.
            row_with(
                temperature=3.0,
                seed=6,
                seen=seen,
                repetition_penalty=1.5,
                frequency_penalty=0.5,
                logit_bias={4: 20.0, 5: -20.0, 6: 20.0},
                banned=(6,),
                logprobs=1,
            ),
        ]
        fused = Fused(shallow, sizes=sizes)
        tables = [fused.tables[i % 4][i // 4 : i // 4 + 1] for i in range(len(params))]
        batch = [SequenceInput([9 + i], 0, tables[i], (row,)) for i, row in enumerate(params)]
        result = fused.runner.launch(batch).wait()
        logits = fused.runner.logits(batch)
        expected = logits.clone()
        for row, own in enumerate(params):
            for token, bias in own.asked.logit_bias.items():
                expected[row, token] += bias
        for row in (2, 4, 6):
            own = params[row]
            for token, count in ((4, 0), (5, 0), (6, 2), (7, 1)):
                x = expected[row, token]
                x = x / own.asked.repetition_penalty if x > 0 else x * own.asked.repetition_penalty
                expected[row, token] = (
                    x - own.asked.frequency_penalty * count - own.asked.presence_penalty * (count > 0)
                )
        expected[1, :3] = expected[6, 6] = -math.inf
        expected[3, 1::2] = expected[4, 1::2] = -math.inf
        assert [token for (token,) in result.tokens] == reference_tokens(expected, params)
        # Log-probabilities are those of the network's own logits.
        assert sorted(result.logprobs) == [0, 2, 3, 5, 6]
        for row, (entry,) in result.logprobs.items():
            logprobs = logits[row].log_softmax(-1)
            assert [entry.token_id] == result.tokens[row]
            assert entry.logprob == pytest.approx(float(logprobs[entry.token_id]), abs=1e-4)
            best = logprobs.topk(params[row].asked.logprobs or 0)
            assert entry.top_ids == best.indices.tolist()
            assert entry.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-4)

    def test_of_samples_of_one_prompt_are_those_of_each_alone(self, shallow: Path) -> None:
        samples = [row_with(temperature=3.0, seed=4, sample_index=index, logprobs=0) for index in range(5)]
        fused = Fused(shallow, sizes=[])
        prompt = [7, 8, 9]
        batch = [SequenceInput(prompt, 0, fused.tables[0], samples), SequenceInput([3], 0, fused.tables[1], (GREEDY,))]
        result = fused.runner.launch(batch).wait()
        tokens = [token for (token,) in result.tokens[:5]]
        for row in (0, 4):
            assert fused.runner.run([SequenceInput(prompt, 0, fused.tables[0], (samples[row],))]) == [tokens[row]]
        assert len(set(tokens)) > 1
        assert sorted(result.logprobs) == [0, 1, 2, 3, 4]
        assert [result.logprobs[row][0].token_id for row in range(5)] == tokens

    def test_of_more_rows_than_were_reserved_are_refused(self, shallow: Path) -> None:
        kernels = FusedKernels(CPU)
        kernels.reserve(limits(PersimmonConfig.from_folder(shallow), 1))
        with pytest.raises(ValueError, match="2 rows, but the workspace has room for 1"):
            FusedSampler(kernels, FusedWeight(torch.randn(VOCAB_SIZE, 64)))(torch.randn(2, 64), [GREEDY, GREEDY])

    def test_are_the_same_in_every_batch(self, shallow: Path) -> None:
        asked = prompts(4, 9, 6)
        params = [row_with(temperature=0.9, seed=seed) for seed in (1, 2, 2**40)]
        together = Fused(shallow).generate(asked, params)
        eagerly = Fused(shallow, sizes=[]).generate(asked, params)
        assert together == eagerly
        assert Fused(shallow).generate(asked[2:], params[2:]) == together[2:]

    def test_from_one_token_are_greedy_beside_others_that_are_free(self, shallow: Path) -> None:
        asked = prompts(4, 9, 6)
        one = [row_with(temperature=1.0, top_k=1), row_with(temperature=1.0, top_p=1e-9)]
        greedy = greedily(shallow, asked)
        drawn = Fused(shallow).generate(asked, [*one, DRAWN])
        assert drawn[:2] == greedy[:2]
        assert drawn[2] != greedy[2]


class TestSizes:
    @pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 8, 60, 64, 100, 256])
    def test_end_with_all_sequences(self, max_num_seqs: int) -> None:
        sizes = default_sizes(max_num_seqs)
        assert sizes == sorted(set(sizes))
        assert (sizes[0], sizes[-1]) == (1, max_num_seqs)

    def test_take_memory_by_the_largest_and_by_their_number(self, shallow: Path) -> None:
        config = PersimmonConfig.from_folder(shallow)
        assert graph_bytes(config, torch.float16, []) == 0
        one = graph_bytes(config, torch.float16, [8])
        assert one > 8 * 4 * VOCAB_SIZE
        assert one < graph_bytes(config, torch.float16, [4, 8]) < graph_bytes(config, torch.float16, [4, 16])

    def test_take_memory_for_the_logits_of_the_largest(self, shallow: Path) -> None:
        config = PersimmonConfig.from_folder(shallow)
        wider = replace(config, vocab_size=3 * config.vocab_size)
        more = graph_bytes(wider, torch.float16, [2, 8]) - graph_bytes(config, torch.float16, [2, 8])
        assert more == 8 * 2 * 4 * config.vocab_size

    def test_decide_which_steps_run_on_fixed_buffers(self, shallow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fused = Fused(shallow, sizes=[2])
        assert fused.graphs is not None
        taken: list[int] = []
        launch = fused.graphs.launch

        def counted(batch: Sequence[SequenceInput]) -> Samples:
            taken.append(len(batch))
            return launch(batch)

        monkeypatch.setattr(fused.graphs, "launch", counted)
        one, two, three = (SequenceInput([3], 0, table, (GREEDY,)) for table in fused.tables[:3])
        for batch in ([one], [one, two], [one, two, three]):
            assert len(fused.runner.run(batch)) == len(batch)
        assert taken == [1, 2]
        # One token that is not a sequence's last known one draws nothing.
        expected = fused.runner.run([one])
        assert fused.runner.run([replace(two, samplings=()), one]) == expected
        assert taken == [1, 2, 1]

    def test_beyond_the_largest_a_step_runs_without(self, shallow: Path) -> None:
        asked = prompts(3, 4, 5)
        fused = Fused(shallow, sizes=[1])
        assert fused.graphs is not None
        assert not fused.graphs.takes(3)
        assert fused.generate(asked) == greedily(shallow, asked)
