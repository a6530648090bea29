"""Guesses on the path of a GPU, through Triton's interpreter: every answer has the bits that it has without guesses."""

import random
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from persimmon.kernels.fused import FusedKernels
from persimmon.model.fused_executor import FusedExecutor
from persimmon.model.grammar import GrammarCompiler, GrammarSpec
from persimmon.model.runner import Runner
from persimmon.model.sampling_params import SamplingParams
from persimmon.model.token_logprobs import TokenLogprobs
from persimmon.server.engine.guesses import Speculation
from persimmon.server.engine.proposers import Proposal
from persimmon.server.engine.sequence import Sequence
from tests.engine_harness import CPU, Harness, load_model, new_tokens, poisoned_cache
from tests.fake_cuda.checkpoint import VOCAB_SIZE, write_checkpoint
from tests.interpreter import keep_language_patched, multiply_as_matrix_units
from tests.model.fused_steps import BLOCK_SIZE, limits

MAX_GUESSES = 4
EOS = VOCAB_SIZE - 1

Answers = dict[object, tuple[list[int], str | None, list[TokenLogprobs]]]


@dataclass(frozen=True)
class HalfRight:
    """Guesses an answer that is known; tokens at some places are others."""

    answer: list[int]
    prompt_length: int
    wrong: random.Random

    def propose(self, token_ids: Ids[int], count: int) -> Proposal:
        guesses = self.answer[len(token_ids) - self.prompt_length :][: min(count, MAX_GUESSES)]
        return Proposal([token if self.wrong.random() < 0.7 else 1 for token in guesses], 1)


@pytest.fixture(autouse=True)
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_language_patched()
    multiply_as_matrix_units(monkeypatch)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def grammars() -> GrammarCompiler:
    """Of a vocabulary of single bytes."""
    return GrammarCompiler([bytes([token]) for token in range(128)], VOCAB_SIZE, {EOS})


def harness(
    checkpoint: Path, kernels: FusedKernels, grammars: GrammarCompiler | None, num_blocks: int, **options: Any
) -> Harness:
    """An engine whose steps overlap, as on a GPU."""
    model = load_model(checkpoint, torch.float16, kernels)
    executor = FusedExecutor(kernels, (1, 3, 8), guesses=MAX_GUESSES)
    executor.reserve(limits(model.config, 8))
    runner = Runner(executor.start(model, poisoned_cache(model, num_blocks, BLOCK_SIZE)))
    return Harness(model, num_blocks=num_blocks, runner=runner, grammars=grammars, overlap=True, **options)


def answers(engine: Harness, leaders: Ids[Sequence], arrivals: Ids[int] | None = None) -> Answers:
    """What each sequence gets."""
    everyone = [own for leader in leaders for own in leader.family]
    engine.run(leaders, arrivals)
    assert engine.failures == {}
    return {own.key: (new_tokens(own), own.finish_reason, engine.reports[own].logprobs) for own in everyone}


def half_right(plain: Answers) -> Speculation:
    def make(own: Sequence) -> HalfRight:
        return HalfRight(plain[own.key][0], own.prompt_length, random.Random(str(own.key)))

    return Speculation(make)


def requests(
    prompts: Ids[list[int]], samplings: Ids[SamplingParams], max_tokens: int, samples: int = 1
) -> list[Sequence]:
    """A request for each prompt; the last one has several samples."""

    def sample(number: int, index: int = 0, forks: Ids[Sequence] = ()) -> Sequence:
        return Sequence(
            key=(number, index),
            token_ids=list(prompts[number]),
            max_tokens=max_tokens,
            stop_token_ids=frozenset({EOS}),
            sampling=samplings[number],
            sample_index=index,
            forks=list(forks),
        )

    last = len(prompts) - 1
    forks = [sample(last, index) for index in range(1, samples)]
    return [*(sample(number) for number in range(last)), sample(last, forks=forks)]


SAMPLINGS = [
    SamplingParams(temperature=1.2, seed=3, grammar=GrammarSpec("regex", "(ab|c|[a-f]{2}){6,30}"), logprobs=0),
    SamplingParams(temperature=1.0, seed=1, presence_penalty=0.5, frequency_penalty=0.7, logprobs=2),
    SamplingParams(temperature=0.0, logprobs=1),
    SamplingParams(temperature=0.8, seed=2, top_p=0.9, logit_bias={EOS: 3.0}, min_tokens=4),
    SamplingParams(temperature=1.0, seed=4),
]


def test_an_answer_does_not_depend_on_guesses(checkpoint: Path, grammars: GrammarCompiler) -> None:
    prompts = [[7, 8], [5], [4, 3]]
    plain = answers(harness(checkpoint, FusedKernels(CPU), grammars, 8), requests(prompts, SAMPLINGS, 5))
    engine = harness(checkpoint, FusedKernels(CPU), grammars, 8, speculation=half_right(plain))
    assert answers(engine, requests(prompts, SAMPLINGS, 5)) == plain
    assert 0 < engine.stats.accepted_tokens < engine.stats.draft_tokens
