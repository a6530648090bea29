"""Guessed tokens: whatever is guessed, every sequence gets the tokens and log-probabilities that it gets without."""

import json
import random
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from persimmon.model.config import PersimmonConfig
from persimmon.model.grammar import GrammarCompiler, GrammarSpec
from persimmon.model.persimmon import Persimmon
from persimmon.model.sampling_params import SamplingParams
from persimmon.model.token_logprobs import TokenLogprobs
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.guesses import Speculation
from persimmon.server.engine.proposers import Proposal
from persimmon.server.engine.sequence import Sequence
from persimmon.server.settings.speculation import SpeculativeConfig
from tests.engine_harness import Harness, load_model, new_tokens

SCHEMA = json.dumps(
    {
        "type": "array",
        "items": {"type": "object", "properties": {"name": {"enum": ["plum", "fig"]}}, "required": ["name"]},
        "minItems": 2,
        "maxItems": 4,
    }
)

SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0, "logprobs": 0},
    {"temperature": 1.0, "logprobs": 2},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 20, "min_p": 0.02, "logprobs": 1},
    {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 1},
    {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.7},
    {"temperature": 0.8, "logit_bias": {70: 4.0, 71: -100.0}, "min_tokens": 12},
    {"temperature": 0.6, "grammar": GrammarSpec("json_schema", SCHEMA, leading_space=True), "logprobs": 1},
    {"temperature": 1.2, "grammar": GrammarSpec("regex", "(ab|c|[a-f]{2} ){3,30}", leading_space=True)},
    {"temperature": 1.0, "grammar": GrammarSpec("regex", "(ha){2,20}", leading_space=True), "frequency_penalty": 0.4},
]


@dataclass
class Given:
    """Guesses with the answer that is known from a run without guesses; tokens at some places are others."""

    answer: list[int]
    prompt_length: int
    wrong: random.Random | None = None

    def propose(self, token_ids: Ids[int], count: int) -> Proposal:
        guesses = self.answer[len(token_ids) - self.prompt_length :][: min(count, 6)]
        if self.wrong is not None:
            guesses = [token if self.wrong.random() < 0.6 else token + 1 for token in guesses]
        return Proposal(guesses, 1)


class Hostile:
    """Guesses anything: the first token, the last, an end of text, repetitions, few or very many."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        self._random = random.Random(seed)
        self._vocab_size = vocab_size

    def propose(self, token_ids: Ids[int], count: int) -> Proposal:
        pool = [0, 1, 2, self._vocab_size - 1, token_ids[-1], self._random.randrange(self._vocab_size)]
        return Proposal(self._random.choices(pool, k=self._random.choice([0, 1, min(count, 3), min(count, 40)])), 1)


@pytest.fixture(scope="module")
def model(demo_checkpoint: Path) -> Persimmon:
    return load_model(demo_checkpoint)


@pytest.fixture(scope="module")
def tokenizer(demo_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_folder(demo_checkpoint)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer, demo_checkpoint: Path) -> GrammarCompiler:
    config = PersimmonConfig.from_folder(demo_checkpoint)
    return GrammarCompiler.for_tokenizer(tokenizer, config.vocab_size, config.eos_token_ids)


def families(tokenizer: Tokenizer, eos: frozenset[int]) -> list[Sequence]:
    """A request for each of SAMPLINGS, some with several samples, priorities, stop tokens or reports."""

    def family(number: int, sampling: dict[str, Any]) -> Sequence:
        prompt = tokenizer.encode(f"human: Say plum, plum and fig {number * '!'}\n\nadept:")
        grammar = "grammar" in sampling

        def sample(index: int, forks: list[Sequence], **reports: Any) -> Sequence:
            return Sequence(
                key=(number, index),
                token_ids=list(prompt),
                max_tokens=60 if grammar else 24 + number,
                stop_token_ids=eos if grammar or number % 2 else frozenset(),
                sampling=SamplingParams(seed=number, **sampling),
                sample_index=index,
                priority=number % 3,
                forks=forks,
                **reports,
            )

        forks = [sample(index, []) for index in range(1, 1 + (number in (1, 5, 7)) * 2)]
        return sample(0, forks, prompt_logprobs=1 if number == 2 else None)

    return [family(number, sampling) for number, sampling in enumerate(SAMPLINGS)]


Answers = dict[object, tuple[list[int], str | None, list[TokenLogprobs], list[TokenLogprobs]]]


def answers(harness: Harness, leaders: list[Sequence]) -> Answers:
    """What each sequence gets: tokens, finish reason and reports."""
    everyone = [own for leader in leaders for own in leader.family]
    harness.run(leaders, arrivals=[3 * place % 7 for place in range(len(leaders))])
    assert harness.failures == {}
    return {
        own.key: (
            new_tokens(own),
            own.finish_reason,
            harness.reports[own].logprobs,
            harness.reports[own].prompt_logprobs,
        )
        for own in everyone
    }


@pytest.fixture(scope="module")
def plain(model: Persimmon, tokenizer: Tokenizer, grammars: GrammarCompiler) -> Answers:
    """The answers without guesses."""
    leaders = families(tokenizer, frozenset(model.config.eos_token_ids))
    return answers(Harness(model, num_blocks=200, grammars=grammars), leaders)


CONFIGS = {
    "ngram": SpeculativeConfig(method="ngram", num_speculative_tokens=5, prompt_lookup_min=1, prompt_lookup_max=3),
    "suffix": SpeculativeConfig(method="suffix", num_speculative_tokens=8),
}


def speculation(kind: str, plain: Answers, vocab_size: int) -> Speculation | None:
    def make(own: Sequence) -> Any:
        seed = hash(own.key)
        return {
            "right": lambda: Given(plain[own.key][0], own.prompt_length),
            "half right": lambda: Given(plain[own.key][0], own.prompt_length, random.Random(seed)),
            "hostile": lambda: Hostile(seed, vocab_size),
        }[kind]()

    return Speculation.of(CONFIGS[kind], 32, 512) if kind in CONFIGS else Speculation(make)


@pytest.mark.parametrize(
    ("kind", "limits"),
    [
        ("ngram", {"num_blocks": 200}),
        ("suffix", {"num_blocks": 200, "prefix_caching": True, "max_num_batched_tokens": 40}),
        ("right", {"num_blocks": 200, "max_num_seqs": 4}),
        ("right", {"num_blocks": 22, "typical_output": 1, "prefix_caching": True}),
        ("half right", {"num_blocks": 200, "overlap": True}),
        ("half right", {"num_blocks": 24, "typical_output": 1}),
        ("hostile", {"num_blocks": 40, "max_num_batched_tokens": 64, "max_num_seqs": 9}),
    ],
)
def test_every_answer_is_bit_for_bit_the_one_without_guesses(
    model: Persimmon,
    tokenizer: Tokenizer,
    grammars: GrammarCompiler,
    plain: Answers,
    kind: str,
    limits: dict[str, Any],
) -> None:
    guessing = speculation(kind, plain, model.config.vocab_size)
    harness = Harness(model, grammars=grammars, speculation=guessing, **limits)
    got = answers(harness, families(tokenizer, frozenset(model.config.eos_token_ids)))
    assert got == plain
    assert harness.stats.draft_tokens > 0
    if kind in ("right", "half right"):
        assert harness.stats.accepted_tokens > 100
    if kind == "right":
        assert harness.stats.accepted_tokens == harness.stats.draft_tokens
    if "typical_output" in limits:
        assert harness.stats.preemptions > 0
