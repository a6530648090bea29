"""Guesses on the path of a GPU, through Triton's interpreter: a step with some makes what steps of single tokens make.

What is captured on a GPU is here launched anew for each step, from the same buffers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from persimmon.kernels.fused import SMALL_STEP, FusedKernels
from persimmon.model.config import PersimmonConfig
from persimmon.model.fused_executor import FusedExecutor
from persimmon.model.graph_sizes import default_sizes, graph_bytes, guess_sizes
from persimmon.model.runner import SequenceInput
from persimmon.model.token_logprobs import TokenLogprobs
from tests.engine_harness import CPU
from tests.fake_cuda.checkpoint import write_checkpoint
from tests.interpreter import keep_language_patched, multiply_as_matrix_units
from tests.model.fused_steps import GREEDY, Fused, assert_same_bits, at_position, limits
from tests.model.rows import row_with

CONTEXTS = (14, 5, 31)
GUESSES = (2, 0, 1)
"""Of each sequence; those of the first and the last end in another block than they begin in."""

DRAWS = (
    row_with(temperature=1.0, seed=7, logprobs=2),
    GREEDY,
    row_with(temperature=2.0, seed=3, top_k=20, top_p=0.9, logprobs=0),
)


@pytest.fixture(autouse=True)
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_language_patched()
    multiply_as_matrix_units(monkeypatch)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


def start(checkpoint: Path, sizes: Sequence[int], mixed_sizes: Sequence[int] = ()) -> Fused:
    fused = Fused(checkpoint, torch.float16, sizes, mixed_sizes, guesses=max(GUESSES))
    fused.fill(CONTEXTS)
    return fused


@dataclass
class Alone:
    """What single tokens make: each sequence's, in order, with what is reported of them; and the cache after them."""

    tokens: list[list[int]]
    logprobs: list[list[TokenLogprobs]]
    fused: Fused


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> Alone:
    with pytest.MonkeyPatch.context() as patch:
        multiply_as_matrix_units(patch)
        made = Alone([[] for _ in GUESSES], [[] for _ in GUESSES], start(checkpoint, [1, 2, 3]))
        last = [9] * len(GUESSES)
        for done in range(1 + max(GUESSES)):
            going = [place for place, count in enumerate(GUESSES) if done <= count]
            batch = [
                SequenceInput([last[i]], CONTEXTS[i] + done, made.fused.tables[i], [at_position(DRAWS[i], done)])
                for i in going
            ]
            outcome = made.fused.runner.launch(batch).wait()
            for row, place in enumerate(going):
                (last[place],) = outcome.tokens[row]
                made.tokens[place].append(last[place])
                made.logprobs[place] += outcome.logprobs.get(row, [])
    return made


def guessed(fused: Fused, alone: Alone) -> list[SequenceInput]:
    """A step that computes the same tokens, all of which have been guessed."""
    return [
        SequenceInput(
            [9, *alone.tokens[i][:count]],
            CONTEXTS[i],
            fused.tables[i],
            [at_position(DRAWS[i], position) for position in range(1 + count)],
            guesses=count,
        )
        for i, count in enumerate(GUESSES)
    ]


@pytest.mark.parametrize("sizes", [[4], []], ids=["fixed buffers", "eager"])
def test_a_step_with_guesses_makes_what_single_steps_make(checkpoint: Path, alone: Alone, sizes: list[int]) -> None:
    fused = start(checkpoint, sizes)
    made = fused.runner.launch(guessed(fused, alone)).wait()
    assert made.tokens == alone.tokens
    assert made.logprobs == {place: alone.logprobs[place] for place in (0, 2)}
    assert_same_bits(alone.fused, fused)


def test_next_to_a_prompt_it_makes_the_same(checkpoint: Path, alone: Alone) -> None:
    """The server makes no such step; a caller of the runner may."""
    fused = start(checkpoint, [4], mixed_sizes=[16])
    prompt = SequenceInput([5, 6], 0, fused.tables[3], (row_with(logprobs=1),))
    made = fused.runner.launch([prompt, *guessed(fused, alone)]).wait()
    assert made.tokens[1:] == alone.tokens
    assert [made.logprobs[place] for place in (1, 3)] == [alone.logprobs[place] for place in (0, 2)]
    assert [entry.token_id for entry in made.logprobs[0]] == made.tokens[0]


def test_guesses_behind_several_tokens_are_refused(checkpoint: Path) -> None:
    fused = Fused(checkpoint, guesses=4)
    batch = [SequenceInput([3, 4, 5], 0, fused.tables[0], [GREEDY, GREEDY], guesses=1)]
    with pytest.raises(ValueError, match="1 guesses follow 2 tokens; expected one token"):
        fused.runner.launch(batch)


class TestSizes:
    @pytest.mark.parametrize(("sequences", "guesses", "rows"), [(1, 5, 6), (3, 1, 6), (24, 16, SMALL_STEP), (24, 0, 0)])
    def test_of_a_step_with_guesses_are_those_of_a_small_one(
        self, checkpoint: Path, sequences: int, guesses: int, rows: int
    ) -> None:
        executor = FusedExecutor(FusedKernels(CPU), guesses=guesses)
        assert executor.max_guess_rows == 0, "nothing is reserved for them yet"
        executor.reserve(limits(PersimmonConfig.from_folder(checkpoint), sequences))
        assert executor.max_guess_rows == rows
        assert len(executor.kernels.sampled) == max(sequences, rows)

    def test_that_have_graphs_begin_at_two_tokens(self) -> None:
        assert guess_sizes(0) == []
        assert guess_sizes(6) == [2, 4, 6]
        assert guess_sizes(SMALL_STEP) == default_sizes(SMALL_STEP)[1:]

    def test_take_memory(self, checkpoint: Path) -> None:
        config = PersimmonConfig.from_folder(checkpoint)
        none, same, more = (graph_bytes(config, torch.float16, [1, 8], with_guesses=own) for own in ([], [8], [8, 16]))
        assert none < same < more
