"""What the engine reports of prompts and answers equals Transformers', however they were computed."""

import random
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PersimmonForCausalLM, PersimmonModel

from persimmon.kernels import Kernels
from persimmon.model.persimmon import Persimmon
from persimmon.model.sampling_params import SamplingParams
from persimmon.model.token_logprobs import TokenLogprobs
from persimmon.server.engine.messages import Pooling
from persimmon.server.engine.sequence import Sequence
from tests.engine_harness import GREEDY, Harness, load_model
from tests.model import transformers_reference

NEW_TOKENS = 20
TOP = 5
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """Prompts of many lengths, and Transformers' logits after each of their tokens."""

    model: Persimmon
    transformers: PersimmonForCausalLM
    prompts: list[list[int]]

    @torch.inference_mode()
    def logprobs(self, token_ids: Ids[int]) -> torch.Tensor:
        """[tokens, vocab_size] log-probabilities of what follows each token."""
        return self.transformers(torch.tensor([list(token_ids)])).logits[0].double().log_softmax(-1)


@pytest.fixture(scope="module")
def case(random_checkpoint: Path) -> Case:
    rng = random.Random(8)
    prompts = [[rng.randrange(2, 4096) for _ in range(length)] for length in (1, 2, 15, 16, 17, 40, 75)]
    return Case(load_model(random_checkpoint), transformers_reference.load(random_checkpoint), prompts)


def check(entries: Ids[TokenLogprobs], tokens: Ids[int], expected: torch.Tensor) -> None:
    """One entry a token, each with the reference's figures."""
    assert [entry.token_id for entry in entries] == list(tokens)
    for entry, own in zip(entries, expected, strict=True):
        assert entry.logprob == pytest.approx(float(own[entry.token_id]), abs=TOLERANCE)
        assert entry.top_logprobs == pytest.approx(own.topk(TOP).values.tolist(), abs=TOLERANCE)
        # Near-ties may change places; each token's figure is its own.
        assert [float(own[token]) for token in entry.top_ids] == pytest.approx(entry.top_logprobs, abs=TOLERANCE)


WAYS: dict[str, dict[str, Any]] = {
    "whole": {"num_blocks": 40},
    "in small chunks": {"num_blocks": 40, "max_num_seqs": 4, "max_num_batched_tokens": 7},
    "preempted": {"num_blocks": 7, "max_num_batched_tokens": 40},
    "on prefix hits": {"num_blocks": 60, "prefix_caching": True},
    "overlapped": {"num_blocks": 40, "max_num_batched_tokens": 32, "overlap": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_logprobs_of_prompts_and_answers_are_transformers(
    case: Case, random_checkpoint: Path, cpu_kernels: Kernels[Any, Any], way: str
) -> None:
    model = load_model(random_checkpoint, operations=cpu_kernels)
    harness = Harness(model, operations=cpu_kernels, **WAYS[way])
    if way == "on prefix hits":
        harness.generate(case.prompts, 2)
    sequences = [
        Sequence(
            key, list(prompt), NEW_TOKENS, sampling=SamplingParams(temperature=0.0, logprobs=TOP), prompt_logprobs=TOP
        )
        for key, prompt in enumerate(case.prompts)
    ]
    harness.run(sequences)
    if way == "preempted":
        assert harness.stats.preemptions > 0
    for prompt, sequence in zip(case.prompts, sequences, strict=True):
        reported, expected = harness.reports[sequence], case.logprobs(sequence.token_ids)
        check(reported.prompt_logprobs, prompt[1:], expected[: len(prompt) - 1])
        check(reported.logprobs, sequence.token_ids[len(prompt) :], expected[len(prompt) - 1 : -1])


def test_all_probabilities_of_a_place_sum_to_one(case: Case) -> None:
    harness = Harness(case.model, num_blocks=40)
    size = case.model.config.vocab_size
    sequence = Sequence(0, case.prompts[3][:3], 1, sampling=SamplingParams(logprobs=size), prompt_logprobs=size)
    harness.run([sequence])
    reported = harness.reports[sequence]
    for entry in (*reported.prompt_logprobs, *reported.logprobs):
        assert len(set(entry.top_ids)) == size
        assert sum(torch.tensor(entry.top_logprobs).double().exp()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pooling", ["last", "sum", "all"])
def test_pooled_states_are_transformers(case: Case, way: str, pooling: Pooling) -> None:
    harness = Harness(case.model, **WAYS[way])
    if way == "on prefix hits":
        harness.generate(case.prompts, 1)
    # Together with others that generate, which may take their blocks.
    others = [Sequence(100 + key, list(prompt), 20, sampling=GREEDY) for key, prompt in enumerate(case.prompts)]
    sequences = [Sequence(key, list(prompt), 0, pooling=pooling) for key, prompt in enumerate(case.prompts)]
    harness.run([own for pair in zip(others, sequences, strict=True) for own in pair])
    body: PersimmonModel = case.transformers.model
    for prompt, sequence in zip(case.prompts, sequences, strict=True):
        with torch.inference_mode():
            states = body(torch.tensor([prompt])).last_hidden_state[0]
        rows = torch.tensor(harness.reports[sequence].pooled).view(-1, states.shape[1])
        expected = {"last": states[-1:], "sum": states.sum(0, keepdim=True), "all": states}[pooling]
        # A sum comes in parts, one for each chunk.
        torch.testing.assert_close(
            rows.sum(0, keepdim=True) if pooling == "sum" else rows, expected, rtol=0, atol=TOLERANCE * len(prompt)
        )


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("way", ["whole", "in small chunks", "preempted", "overlapped"])
def test_each_sample_of_a_prompt_is_what_it_would_be_alone(case: Case, way: str, prefix_caching: bool) -> None:
    """One prompt, many samples, whose settings look at what came before."""
    sampling = SamplingParams(temperature=1.0, seed=11, logprobs=2, frequency_penalty=0.5, repetition_penalty=1.2)
    prompt = case.prompts[5]
    samples = 5

    def sample(index: int, **more: Any) -> Sequence:
        return Sequence(index, list(prompt), NEW_TOKENS, sampling=sampling, sample_index=index, **more)

    alone = []
    for index in range(samples):
        harness = Harness(case.model, num_blocks=40)
        sequence = sample(index)
        harness.run([sequence])
        alone.append((sequence.token_ids, [entry.token_id for entry in harness.reports[sequence].logprobs]))
    harness = Harness(case.model, **WAYS[way] | {"prefix_caching": prefix_caching})
    leader = sample(0, forks=[sample(index) for index in range(1, samples)])
    family = leader.family
    harness.run([Sequence("other", list(case.prompts[4]), 9, sampling=GREEDY), leader])
    together = [
        (sequence.token_ids, [entry.token_id for entry in harness.reports[sequence].logprobs]) for sequence in family
    ]
    assert together == alone
    assert len({tuple(token_ids) for token_ids, _ in alone}) > 1
