"""Guesses on the path of a GPU through Triton's interpreter, with more kinds of draws and more that happens to them."""

from pathlib import Path

from persimmon.kernels.fused import FusedKernels
from persimmon.kernels.invariant import InvariantKernels
from persimmon.model.grammar import GrammarCompiler
from persimmon.model.sampling_params import SamplingParams
from tests.engine_harness import CPU
from tests.model.fused_steps import prompts
from tests.server.engine import test_speculation_gpu
from tests.server.engine.test_speculation_gpu import SAMPLINGS, answers, half_right, harness, requests

checkpoint, grammars, matrix_units = (
    test_speculation_gpu.checkpoint,
    test_speculation_gpu.grammars,
    test_speculation_gpu.matrix_units,
)


def test_an_answer_does_not_depend_on_guesses_however_it_is_drawn(checkpoint: Path, grammars: GrammarCompiler) -> None:
    asked = prompts(13, 5, 9, 3, 6)
    plain = answers(harness(checkpoint, FusedKernels(CPU), grammars, 40), requests(asked, SAMPLINGS, 9, samples=2))
    engine = harness(checkpoint, FusedKernels(CPU), grammars, 40, speculation=half_right(plain))
    assert answers(engine, requests(asked, SAMPLINGS, 9, samples=2)) == plain
    assert 5 < engine.stats.accepted_tokens < engine.stats.draft_tokens


def test_nor_on_what_else_happens_to_it_in_batch_invariant_mode(checkpoint: Path) -> None:
    """Small chunks, prefix hits, and a cache that is too small."""
    kernels = InvariantKernels(CPU)
    (beginning,) = prompts(17)
    asked = [beginning + prompt for prompt in prompts(5, 9, 3)]
    drawn = [SamplingParams(temperature=1.0, seed=seed, logprobs=1) for seed in range(3)]
    plain = answers(harness(checkpoint, kernels, None, 40), requests(asked, drawn, 14))
    engine = harness(
        checkpoint,
        kernels,
        None,
        4,
        speculation=half_right(plain),
        max_num_batched_tokens=16,
        max_num_seqs=4,
        prefix_caching=True,
        typical_output=1,
    )
    assert answers(engine, requests(asked, drawn, 14), arrivals=[0, 0, 3]) == plain
    assert 0 < engine.stats.accepted_tokens < engine.stats.draft_tokens
    assert engine.stats.preemptions > 0
    assert engine.stats.cached_tokens > 0
