"""The runner: a sequence's results depend only on itself, however it is batched, ordered or cut into chunks."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from persimmon import kernels
from persimmon.model.kv_cache import KVCache
from persimmon.model.persimmon import Persimmon
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import Runner, SequenceInput
from tests.engine_harness import CPU, load_model, poisoned_cache, runner_of
from tests.model.rows import changed, row_with

BLOCK_SIZE = 16
BLOCKS_EACH = 8
NUM_SEQUENCES = 32
GREEDY = row_with()


@pytest.fixture(scope="module")
def model(random_checkpoint: Path) -> Persimmon:
    return load_model(random_checkpoint)


@dataclass
class Bench:
    """A runner with blocks for 32 sequences, each with its own few, scattered over the cache."""

    model: Persimmon
    cache: KVCache = field(init=False)
    runner: Runner = field(init=False)
    tables: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.cache = poisoned_cache(self.model, NUM_SEQUENCES * BLOCKS_EACH, BLOCK_SIZE)
        self.runner = runner_of(self.model, self.cache)
        blocks = list(range(self.cache.num_blocks))
        random.Random(4).shuffle(blocks)
        self.tables = [blocks[i * BLOCKS_EACH : (i + 1) * BLOCKS_EACH] for i in range(NUM_SEQUENCES)]

    def part(self, sequence: int, start: int, end: int, sampling: RowSampling | None = GREEDY) -> SequenceInput:
        """Tokens `start` to `end` of a sequence's text."""
        samplings = () if sampling is None else (sampling,)
        return SequenceInput(text(sequence)[start:end], start, self.tables[sequence], samplings)

    def generate(self, sequences: list[int], count: int, params: list[RowSampling]) -> list[list[int]]:
        """`count` tokens for each, all side by side; prompts are the first tokens of their texts."""
        prompts = [text(sequence)[: 1 + 3 * sequence] for sequence in sequences]
        inputs = [
            SequenceInput(prompt, 0, self.tables[sequence], (own,))
            for sequence, prompt, own in zip(sequences, prompts, params, strict=True)
        ]
        outputs: list[list[int]] = [[] for _ in sequences]
        for position in range(1, count + 1):
            tokens = self.runner.run(inputs)
            for output, token in zip(outputs, tokens, strict=True):
                output.append(token)
            inputs = [
                SequenceInput(
                    [token],
                    last.start + len(last.token_ids),
                    last.block_table,
                    (replace(own, position=position),),
                )
                for last, token, own in zip(inputs, tokens, params, strict=True)
            ]
        return outputs


def text(sequence: int) -> list[int]:
    return random.Random(sequence).choices(range(2, 4096), k=BLOCKS_EACH * BLOCK_SIZE)


@pytest.fixture
def bench(model: Persimmon) -> Bench:
    return Bench(model)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def params_of(sequence: int) -> RowSampling:
    kinds = [
        GREEDY,
        row_with(temperature=1.0),
        row_with(temperature=0.8, top_p=0.9),
        row_with(temperature=1.3, top_k=40, min_p=0.01),
    ]
    return changed(kinds[sequence % len(kinds)], seed=sequence)


def test_a_sequence_alone_and_in_a_batch_of_32_gets_the_same_tokens(model: Persimmon) -> None:
    everyone = list(range(NUM_SEQUENCES))
    together = Bench(model).generate(everyone, 24, [params_of(sequence) for sequence in everyone])
    for sequence in everyone[::3]:
        assert Bench(model).generate([sequence], 24, [params_of(sequence)]) == [together[sequence]]


@pytest.mark.usefixtures("two_threads")
def test_the_number_of_threads_does_not_change_the_tokens(model: Persimmon) -> None:
    everyone = list(range(NUM_SEQUENCES))
    params = [params_of(sequence) for sequence in everyone]
    threaded = Bench(model).generate(everyone, 16, params)
    torch.set_num_threads(1)
    assert Bench(model).generate(everyone, 16, params) == threaded


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_a_batch_does_not_matter(model: Persimmon, seed: int) -> None:
    def run(order: list[int]) -> list[int]:
        """Decodes, chunks that sample, and chunks that do not, after contexts of all lengths."""
        bench = Bench(model)
        ends = [10 + 3 * sequence for sequence in range(NUM_SEQUENCES)]
        counts = [(1, 1, 7, 1, 20)[sequence % 5] for sequence in range(NUM_SEQUENCES)]
        bench.runner.run(
            [bench.part(sequence, 0, ends[sequence] - min(counts[sequence], 9), None) for sequence in order]
        )
        batch = [
            bench.part(
                sequence,
                ends[sequence] - min(counts[sequence], 9),
                ends[sequence],
                None if sequence % 5 == 2 else params_of(sequence),
            )
            for sequence in order
        ]
        tokens = iter(bench.runner.run(batch))
        by_sequence = {sequence: next(tokens) for sequence in order if sequence % 5 != 2}
        assert next(tokens, None) is None
        return [by_sequence[sequence] for sequence in sorted(by_sequence)]

    in_order = list(range(NUM_SEQUENCES))
    shuffled = random.Random(seed).sample(in_order, k=NUM_SEQUENCES)
    assert run(shuffled) == run(in_order)


def test_a_step_in_which_nobody_samples_returns_nothing(bench: Bench) -> None:
    assert bench.runner.run([bench.part(0, 0, 5, None), bench.part(1, 0, 1, None)]) == []
    # Its keys and values are there all the same.
    (token,) = bench.runner.run([bench.part(0, 5, 6)])
    (expected,) = Bench(bench.model).runner.run([bench.part(0, 0, 6)])
    assert token == expected


def test_a_chunk_that_does_not_sample_gets_no_token_in_a_mixed_step(bench: Bench) -> None:
    alone = [Bench(bench.model).runner.run([bench.part(sequence, 0, 9)]) for sequence in (3, 5)]
    tokens = bench.runner.run([bench.part(2, 0, 30, None), bench.part(3, 0, 9), bench.part(4, 0, 1, None)])
    assert tokens == alone[0]
    tokens = bench.runner.run([bench.part(5, 0, 9), bench.part(2, 30, 40, None)])
    assert tokens == alone[1]


@pytest.mark.parametrize("pieces", [[40], [1, 39], [39, 1], [16, 24], [17, 16, 7], [1] * 40], ids=str)
def test_a_prompt_in_pieces_gets_the_same_token(bench: Bench, pieces: list[int]) -> None:
    (expected,) = Bench(bench.model).runner.run([bench.part(7, 0, 40)])
    start = 0
    for piece in pieces[:-1]:
        assert bench.runner.run([bench.part(7, start, start + piece, None)]) == []
        start += piece
    assert bench.runner.run([bench.part(7, start, 40)]) == [expected]


def test_a_sequence_writes_no_block_of_another(bench: Bench) -> None:
    bench.runner.run([bench.part(sequence, 0, 20, None) for sequence in range(4)])
    held = [tensor[bench.tables[1]].clone() for tensor in bench.cache.tensors]
    bench.runner.run([bench.part(0, 20, 60), bench.part(2, 20, 21), bench.part(3, 0, 20)])
    now = [tensor[bench.tables[1]] for tensor in bench.cache.tensors]
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(held, now, strict=True))


def test_what_earlier_sequences_left_in_a_block_does_not_matter(bench: Bench) -> None:
    fresh = Bench(bench.model).runner.run([bench.part(6, 0, 25)])
    taken_over = replace(bench.part(6, 0, 25), block_table=bench.tables[9])
    bench.runner.run([bench.part(9, 0, 120)])
    assert bench.runner.run([taken_over]) == fresh


def test_logits_have_a_row_for_each_sequence_that_samples(bench: Bench) -> None:
    batch = [bench.part(0, 0, 8), bench.part(1, 0, 30, None), bench.part(2, 0, 12)]
    logits = bench.runner.logits(batch)
    assert logits.shape == (2, bench.model.config.vocab_size)
    assert logits.dtype == torch.float32
    assert logits.argmax(-1).tolist() == Bench(bench.model).runner.run(batch)


def test_single_tokens_come_first_and_by_length(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    operations = type(kernels.for_device(CPU))
    plan_attention, planned = operations.plan_attention, []

    def record(self: Any, tables: Any, starts: list[int], counts: list[int], **options: Any) -> Any:
        planned.append(list(zip(starts, counts, strict=True)))
        return plan_attention(self, tables, starts, counts, **options)

    monkeypatch.setattr(operations, "plan_attention", record)
    bench.runner.run([bench.part(1, 0, 20, None), bench.part(2, 0, 5, None)])
    bench.runner.run([bench.part(0, 0, 9), bench.part(1, 20, 21), bench.part(2, 5, 6)])
    assert planned[-1] == [(5, 1), (20, 1), (0, 9)]
