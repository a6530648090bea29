"""The batch-invariant mode of a GPU in Triton's interpreter, over batches of 1 to 300 and chunks of 1 to 2,048.

Here and not in tests/model because the interpreter takes minutes for that many rows; the most telling cases are in
tests/model/test_batch_invariant.py.
"""

import random
from pathlib import Path

import pytest
import torch

from tests.engine_harness import GREEDY
from tests.model.test_batch_invariant import (
    BLOCK_SIZE,
    DRAWN,
    Machine,
    in_chunks,
    matrix_units,
    tiny_checkpoint,
    tokens,
)

__all__ = ["matrix_units"]

pytestmark = pytest.mark.timeout(900)

BATCHES = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257, 300)
LONGEST = 2048


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_a_decode_has_the_same_bits_in_batches_of_1_to_300(checkpoint: Path) -> None:
    machine = Machine(checkpoint, num_blocks=2000)
    lengths = [3, 17, 40, *[2] * 297]
    every = [machine.sequence(tokens(length, seed)) for seed, length in enumerate(lengths)]
    for first in range(0, 300, 60):
        some = every[first : first + 60]
        machine.runner.launch([sequence.part(len(sequence.tokens) - 1, reported=False) for sequence in some]).wait()

    def decode(batch: list[int]) -> dict[int, tuple]:
        parts = []
        for index in batch:
            every[index].done = lengths[index] - 1
            parts.append(every[index].part(1, DRAWN if index < 3 else GREEDY, reported=False))
        outcome = machine.runner.launch(parts).wait()
        return {index: (outcome.tokens[row], outcome.logprobs.get(row)) for row, index in enumerate(batch)}

    alone = {index: decode([index])[index] for index in (0, 1, 2)}
    stored = [every[index].stored() for index in (0, 1, 2)]
    for size in BATCHES[2:]:
        batch = [*random.Random(size).sample(range(3, 300), size - 3), 0, 1, 2]
        random.Random(size + 1).shuffle(batch)
        found = decode(batch)
        assert {index: found[index] for index in alone} == alone, size
        for index, before in enumerate(stored):
            assert torch.equal(every[index].stored(), before), size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_prompt_has_the_same_bits_in_chunks_of_1_to_2048(checkpoint: Path, dtype: torch.dtype) -> None:
    machine, own = (
        Machine(checkpoint, dtype, num_blocks=8 * LONGEST // BLOCK_SIZE, max_model_len=LONGEST),
        tokens(LONGEST),
    )
    whole, stored = in_chunks(machine, own, [LONGEST])
    chooser = random.Random(1)
    cuts: list[list[int]] = [[1024, 1024], [256, 64, 16, 1, 700, 1011], [1, 1, 63, 65, 129, 255, 257, 500]]
    sizes = (1, 1, 2, 16, 33, 64, 65, 128, 300, 777)
    cuts.append(chooser.sample(sizes, len(sizes)))
    for chunks in cuts:
        rest = LONGEST - sum(chunks)
        again, stored_again = in_chunks(machine, own, [*chunks, rest] if rest else chunks)
        assert again == whole
        assert torch.equal(stored_again, stored)
