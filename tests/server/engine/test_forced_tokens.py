"""Guesses at what grammars force: every answer is bit for bit the one without them, in fewer steps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persimmon.model.config import PersimmonConfig
from persimmon.model.grammar import GrammarCompiler, GrammarSpec
from persimmon.model.persimmon import Persimmon
from persimmon.model.sampling_params import SamplingParams
from persimmon.model.token_logprobs import TokenLogprobs
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.guesses import Speculation
from persimmon.server.engine.proposers import Proposal, Proposer
from persimmon.server.engine.sequence import Sequence
from tests.engine_harness import Harness, load_model, new_tokens
from tests.model.random_grammars import grammars

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"fruit": {"enum": ["plum", "persimmon"]}, "count": {"type": "integer", "maximum": 9}},
        "required": ["fruit", "count"],
    }
)

Answer = tuple[list[int], str | None, list[TokenLogprobs]]


class Repeating:
    """Guesses the last tokens again, whether a grammar allows them or not."""

    def propose(self, token_ids: Any, count: int) -> Proposal:
        return Proposal(token_ids[-min(count, 3) :], 1)


@pytest.fixture(scope="module")
def model(demo_checkpoint: Path) -> Persimmon:
    return load_model(demo_checkpoint)


@pytest.fixture(scope="module")
def tokenizer(demo_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_folder(demo_checkpoint)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer, demo_checkpoint: Path) -> GrammarCompiler:
    config = PersimmonConfig.from_folder(demo_checkpoint)
    return GrammarCompiler.for_tokenizer(tokenizer, config.vocab_size, config.eos_token_ids)


@pytest.fixture(scope="module")
def family(model: Persimmon, tokenizer: Tokenizer) -> Callable[..., Sequence]:
    """Makes the samples of one prompt."""
    prompt = tokenizer.encode("human: What is a persimmon?\n\nadept:")

    def make(key: int, sampling: SamplingParams, samples: int = 1, **others: Any) -> Sequence:
        def sample(index: int, forks: list[Sequence]) -> Sequence:
            return Sequence(
                key=(key, index),
                token_ids=list(prompt),
                stop_token_ids=frozenset(model.config.eos_token_ids),
                sampling=sampling,
                sample_index=index,
                forks=forks,
                **{"max_tokens": 60, **others},
            )

        return sample(0, [sample(index, []) for index in range(1, samples)])

    return make


def run(model: Persimmon, compiler: GrammarCompiler, leaders: list[Sequence], **limits: Any) -> tuple[Harness, Any]:
    """What each sequence gets, by its key."""
    everyone = [own for leader in leaders for own in leader.family]
    harness = Harness(model, **{"num_blocks": 100, "grammars": compiler, **limits})
    harness.run(leaders)
    assert harness.failures == {}
    return harness, {own.key: (new_tokens(own), own.finish_reason, harness.reports[own].logprobs) for own in everyone}


def guessing(proposer: type[Proposer] | None = None) -> dict[str, Any]:
    """Limits of an engine that guesses what is forced, as far as it can."""
    make = None if proposer is None else lambda _: proposer()
    return {"speculation": Speculation(make), "guess_forced": True}


samplings = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.5]),
        "seed": st.integers(0, 1000),
        "logprobs": st.sampled_from([None, 0, 2]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 1.3]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 0.7]),
        "logit_bias": st.sampled_from([{}, {300: 6.0, 13: -100.0}]),
        "grammar": grammars,
    }
)


@given(
    asked=st.lists(
        st.tuples(samplings, st.sampled_from([60, 60, 7, 1]), st.sampled_from([1, 1, 3])), min_size=3, max_size=4
    ),
    proposer=st.sampled_from([None, Repeating]),
    few_blocks=st.booleans(),
)
@settings(deadline=None, max_examples=6)
def test_every_answer_is_bit_for_bit_the_one_without_guesses(
    model: Persimmon,
    compiler: GrammarCompiler,
    family: Callable[..., Sequence],
    asked: list[tuple[dict[str, Any], int, int]],
    proposer: type[Proposer] | None,
    few_blocks: bool,
) -> None:
    def leaders() -> list[Sequence]:
        return [
            family(number, SamplingParams(**sampling), samples, max_tokens=max_tokens)
            for number, (sampling, max_tokens, samples) in enumerate(asked)
        ]

    limits: dict[str, Any] = {"num_blocks": 14, "typical_output": 1, "prefix_caching": True} if few_blocks else {}
    _, plain = run(model, compiler, leaders())
    _, guessed = run(model, compiler, leaders(), **limits, **guessing(proposer))
    assert guessed == plain


@pytest.fixture(scope="module")
def fruit(family: Callable[..., Sequence]) -> Callable[..., Sequence]:
    def make(**others: Any) -> Sequence:
        asked = SamplingParams(temperature=0.0, grammar=GrammarSpec("json_schema", SCHEMA, leading_space=True))
        return family(0, asked, **others)

    return make


def test_forced_text_takes_fewer_steps(
    model: Persimmon, compiler: GrammarCompiler, fruit: Callable[..., Sequence]
) -> None:
    without, plain = run(model, compiler, [fruit()])
    harness, guessed = run(model, compiler, [fruit()], **guessing())
    assert guessed == plain
    assert harness.stats.accepted_tokens > 0
    assert harness.stats.steps == without.stats.steps - harness.stats.accepted_tokens
    assert harness.stats.generated_tokens == without.stats.generated_tokens


def test_a_request_without_guesses_has_none_of_its_grammar(
    model: Persimmon, compiler: GrammarCompiler, fruit: Callable[..., Sequence]
) -> None:
    harness, _ = run(model, compiler, [fruit(speculate=False)], **guessing())
    assert harness.stats.draft_tokens == 0


def test_an_engine_without_guesses_has_none_of_grammars(
    model: Persimmon, compiler: GrammarCompiler, fruit: Callable[..., Sequence]
) -> None:
    harness, _ = run(model, compiler, [fruit()], guess_forced=True)
    assert harness.stats.draft_tokens == 0
