"""Steps with prompts on fixed buffers: padding and the division into sequences change nothing that a step makes.

What is captured on a GPU is here launched anew for each step, from the same buffers.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from persimmon.kernels.chunk_plan import CONFIGS
from persimmon.model.graph_sizes import mixed_sizes
from persimmon.model.mixed_inputs import MAX_CHUNKS, MixedBuffer, write_mixed
from persimmon.model.patches import PatchSpan
from persimmon.model.runner import PooledStates, PromptLogprobs, SequenceInput
from persimmon.model.step_outcome import StepOutcome
from tests.engine_harness import CPU
from tests.interpreter import keep_language_patched, multiply_as_matrix_units
from tests.model.fused_steps import GREEDY, Fused, assert_same_bits, prompts, tiny_checkpoint
from tests.model.rows import row_with

DRAWN = row_with(temperature=1.0, seed=7, top_p=0.9, logprobs=2)


@pytest.fixture(autouse=True)
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_language_patched()
    multiply_as_matrix_units(monkeypatch)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("one-layer"), num_hidden_layers=1)


def run(fused: Fused, batch: Sequence[SequenceInput]) -> StepOutcome:
    return fused.runner.launch(batch).wait()


def mixed_steps(fused: Fused) -> list[list[SequenceInput]]:
    """Steps of every kind of chunk next to decodes, each after the ones before; at most 25 tokens."""
    first, second, long, short = prompts(20, 5, 35, 4)
    tables = fused.tables
    decodes = [[SequenceInput([9 + turn], 20 + turn, tables[0], (DRAWN,)) for turn in range(3)]]
    decodes += [[SequenceInput([3 + turn], 5 + turn, tables[1], (GREEDY,)) for turn in range(3)]]
    return [
        [SequenceInput(first, 0, tables[0], (GREEDY,)), SequenceInput(second, 0, tables[1], (DRAWN, GREEDY))],
        [SequenceInput(long[:18], 0, tables[2], ()), decodes[0][0], decodes[1][0]],
        [
            SequenceInput(long[18:], 18, tables[2], (GREEDY,), PromptLogprobs(2, long[21:], 3)),
            decodes[1][1],
            SequenceInput(short, 0, tables[3], (), PooledStates(range(4), total=False)),
            decodes[0][1],
        ],
        [decodes[0][2], replace(decodes[1][2], samplings=())],
    ]


def test_up_to_64_tokens_padding_changes_no_bit(shallow: Path) -> None:
    eager, fixed = Fused(shallow, torch.float16), Fused(shallow, torch.float16, mixed_sizes=[16, 32])
    assert fixed.mixed is not None
    expected = [run(eager, batch) for batch in mixed_steps(eager)]
    # Twice, because two buffers on the host take turns, and each has held another step before.
    for batch, outcome in zip(mixed_steps(fixed) * 2, expected * 2, strict=True):
        assert fixed.mixed.takes(batch)
        assert run(fixed, batch) == outcome
    # Keys and values, and the NaN where no sequence has any.
    assert_same_bits(eager, fixed)


def test_beyond_64_tokens_states_are_those_of_eager_steps(shallow: Path) -> None:
    eager, fixed = Fused(shallow), Fused(shallow, mixed_sizes=[96])
    (prompt,) = prompts(70)
    for fused in (eager, fixed):
        run(fused, [SequenceInput(prompt[:3], 0, fused.tables[1], (GREEDY,))])
    batch = [
        SequenceInput(prompt, 0, eager.tables[0], (GREEDY,), PooledStates(range(70), total=False)),
        SequenceInput([5], 3, eager.tables[1], (GREEDY,)),
    ]
    assert fixed.mixed is not None
    assert fixed.mixed.takes(batch)
    expected, found = run(eager, batch), run(fixed, batch)
    assert found.tokens == expected.tokens
    states = [torch.frombuffer(bytearray(own.pooled[0]), dtype=torch.float32) for own in (expected, found)]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4)
    for own, other in zip(eager.caches, fixed.caches, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4, equal_nan=True)


class TestSteps:
    @pytest.mark.parametrize(
        ("tokens", "chunks", "taken"), [(64, 4, True), (65, 4, False), (64, 5, False), (4, 0, True), (1, 0, True)]
    )
    def test_are_taken_by_their_tokens_and_chunks(self, shallow: Path, tokens: int, chunks: int, taken: bool) -> None:
        fused = Fused(shallow, mixed_sizes=[64])
        assert fused.mixed is not None
        batch = [SequenceInput([3, 4], 0, [0], ()) for _ in range(chunks)]
        batch += [SequenceInput([3], 0, [0], ()) for _ in range(tokens - 2 * chunks)]
        assert fused.mixed.takes(batch) == taken

    def test_whose_tokens_have_embeddings_or_angles_of_their_own_are_not_taken(self, shallow: Path) -> None:
        fused = Fused(shallow, mixed_sizes=[64])
        assert fused.mixed is not None
        plain = SequenceInput([3] * 5, 0, [0], ())
        assert fused.mixed.takes([plain])
        assert not fused.mixed.takes([replace(plain, patches=[PatchSpan(0, np.zeros((1, 48), np.uint8))])])
        assert not fused.mixed.takes([replace(plain, prompt_length=20)])

    def test_have_sizes_up_to_what_a_step_may_have(self) -> None:
        assert mixed_sizes(100) == [16, 32, 64, 96]
        assert mixed_sizes(8) == []
        assert mixed_sizes(4096)[-1] == 512


def test_fields_begin_at_16_bytes_and_share_no_word() -> None:
    buffer = MixedBuffer(96, 7, 5, CONFIGS, CPU)
    tables = buffer.block_tables(MAX_CHUNKS + 1 + 7, 5)
    inputs = buffer.inputs(96, tables)
    chunks = inputs.chunks
    own = [inputs.token_ids, inputs.rows, inputs.lengths, inputs.live, tables, chunks.positions, chunks.slots]
    own += [chunks.query_starts, chunks.starts, *(launch.tiles for launch in chunks.launches)]
    places: list[int] = []
    for tensor in own:
        first = tensor.data_ptr() - buffer.words.data_ptr()
        assert first % 16 == 0
        places += range(first, first + tensor.nbytes)
    assert len(places) == len(set(places))
    assert max(places) < 4 * buffer.size(*tables.shape) == buffer.words.nbytes


def test_only_the_columns_of_block_tables_that_are_in_use_travel() -> None:
    buffer = MixedBuffer(96, 7, 500, CONFIGS, CPU)
    batch = [SequenceInput([3], 20, [8, 9], ()), SequenceInput([4] * 40, 0, [5, 6, 7], ())]
    tables, width = write_mixed(buffer, batch, [0], 96, 16, CONFIGS)
    assert (tables, width) == (MAX_CHUNKS + 2, 3)
    assert buffer.block_tables(tables, width)[[0, -1]].tolist() == [[5, 6, 7], [8, 9, 0]]
