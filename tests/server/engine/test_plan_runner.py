"""Plans in the model's words: what sequences carry from token to token is only theirs, whatever runs with them."""

import gc
import json
import re
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from persimmon.model.config import PersimmonConfig
from persimmon.model.grammar import GrammarCompiler, GrammarError, GrammarSpec
from persimmon.model.persimmon import Persimmon
from persimmon.model.sampling_params import SamplingParams
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.guesses import Speculation
from persimmon.server.engine.messages import PromptSpan
from persimmon.server.engine.plan_runner import COMPILED_GRAMMARS, GrammarProgress, PlanRunner
from persimmon.server.engine.sequence import Sequence
from tests.engine_harness import GREEDY, Harness, load_model

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"enum": ["plum", "fig"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "count"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module")
def tokenizer(demo_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_folder(demo_checkpoint)


@pytest.fixture(scope="module")
def config(demo_checkpoint: Path) -> PersimmonConfig:
    return PersimmonConfig.from_folder(demo_checkpoint)


@pytest.fixture(scope="module")
def model(demo_checkpoint: Path) -> Persimmon:
    return load_model(demo_checkpoint)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer, config: PersimmonConfig) -> GrammarCompiler:
    return GrammarCompiler.for_tokenizer(tokenizer, config.vocab_size, config.eos_token_ids)


def constrained(
    tokenizer: Tokenizer, config: PersimmonConfig, key: object, grammar: GrammarSpec, forks: int = 0, **sampling: object
) -> Sequence:
    """A prompt whose samples must follow a grammar, each drawn in its own way."""

    def sample(index: int, forks: list[Sequence]) -> Sequence:
        return Sequence(
            key=(key, index),
            token_ids=tokenizer.encode("human: What is a persimmon?\n\nadept:"),
            max_tokens=60,
            stop_token_ids=frozenset(config.eos_token_ids),
            sampling=SamplingParams(temperature=1.5, seed=5, grammar=grammar, **sampling),  # type: ignore[arg-type]
            sample_index=index,
            forks=forks,
        )

    return sample(0, [sample(index, []) for index in range(1, forks + 1)])


def text(tokenizer: Tokenizer, sequence: Sequence) -> str:
    return tokenizer.decode(sequence.token_ids[sequence.prompt_length :])


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_blocks", [60, 9])
def test_every_sample_follows_its_grammar_and_others_go_on_as_before(
    model: Persimmon,
    tokenizer: Tokenizer,
    config: PersimmonConfig,
    grammars: GrammarCompiler,
    num_blocks: int,
    overlap: bool,
) -> None:
    """With blocks for all, and so few that sequences are preempted on the way."""
    plain = tokenizer.encode("human: What does galaxy mean?\n\nadept:")
    alone = Harness(model, num_blocks=num_blocks).generate([plain], 40)[0].token_ids
    harness = Harness(model, num_blocks=num_blocks, grammars=grammars, overlap=overlap)
    other = Sequence("other", list(plain), 40, sampling=GREEDY)
    schema = constrained(tokenizer, config, "schema", GrammarSpec("json_schema", SCHEMA), forks=3)
    regex = constrained(tokenizer, config, "regex", GrammarSpec("regex", "(ab|c){3,9}", leading_space=True), top_k=50)
    families = [*schema.family, *regex.family]
    harness.run([schema, other, regex])
    assert other.token_ids == alone
    assert harness.failures == {}
    assert {sequence.finish_reason for sequence in families} == {"stop"}
    for sequence in families[:4]:
        answer = json.loads(text(tokenizer, sequence))
        assert answer.keys() == {"name", "count"}
        assert answer["name"] in ("plum", "fig")
        assert 0 <= answer["count"] <= 99
    assert re.fullmatch(" (ab|c){3,9}", text(tokenizer, regex))
    if num_blocks == 9:
        assert harness.stats.preemptions > 0


def test_a_grammar_that_cannot_be_compiled_fails_its_preparation(model: Persimmon, grammars: GrammarCompiler) -> None:
    harness = Harness(model, num_blocks=9, grammars=grammars)
    sequence = Sequence(1, [5], 4, sampling=SamplingParams(grammar=GrammarSpec("regex", "(")))
    with pytest.raises(GrammarError):
        harness.run([sequence])


def test_a_prompt_with_parts_that_are_not_text_is_refused(model: Persimmon) -> None:
    sequence = Sequence(1, [5, 6], 4, spans=[PromptSpan(start=0, length=1, content=b"a picture")])
    with pytest.raises(ValueError, match="reads text only"):
        Harness(model, num_blocks=9).run([sequence])


def test_a_server_without_a_compiler_refuses_grammars(model: Persimmon) -> None:
    with pytest.raises(GrammarError, match="does not support grammars"):
        Harness(model, num_blocks=9).run(
            [Sequence(1, [5], 4, sampling=SamplingParams(grammar=GrammarSpec("regex", "a")))]
        )


@dataclass
class CountingCompiler:
    """Counts what it compiles; its matchers soon give up."""

    compiled: list[GrammarSpec] = field(default_factory=list)

    def compile(self, spec: GrammarSpec, leading_space: bool = False) -> object:
        self.compiled.append(spec)
        if spec.text == "bad":
            raise GrammarError("it is bad")
        return LimitedMatcher()


def prepare(runner: PlanRunner, grammar: str) -> None:
    prepared = runner.prepare(Sequence(grammar, [1], 1, sampling=SamplingParams(grammar=GrammarSpec("regex", grammar))))
    assert prepared is not None
    prepared.result()


def test_a_grammar_is_compiled_once_and_kept_while_it_is_used() -> None:
    compiler = CountingCompiler()
    runner = PlanRunner(None, compiler)  # type: ignore[arg-type]
    for _ in range(3):
        prepare(runner, "a")
    assert len(compiler.compiled) == 1
    for number in range(COMPILED_GRAMMARS):
        prepare(runner, f"b{number}")
        prepare(runner, "a")
    assert len(compiler.compiled) == 1 + COMPILED_GRAMMARS
    prepare(runner, "b0")
    assert len(compiler.compiled) == 2 + COMPILED_GRAMMARS


def test_a_grammar_that_failed_is_tried_again() -> None:
    compiler = CountingCompiler()
    runner = PlanRunner(None, compiler)  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(GrammarError):
            prepare(runner, "bad")
    assert len(compiler.compiled) == 2


class LimitedMatcher:
    """Follows two tokens, then gives up."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def copy(self) -> "LimitedMatcher":
        return LimitedMatcher()

    def consume(self, token_id: int) -> None:
        if len(self.taken) == 2:
            raise GrammarError("it is too complex")
        self.taken.append(token_id)

    def mask(self) -> np.ndarray:
        """As many words as the demo's vocabulary has bits for, each with one bit more than tokens were taken."""
        return np.full(4096 // 32, 2 ** (1 + len(self.taken)) - 1, dtype=np.int32)


def test_a_grammar_that_gives_up_on_the_way_tells_why_and_harms_no_step() -> None:
    progress = GrammarProgress(LimitedMatcher())  # type: ignore[arg-type]
    assert progress.advance([])[0] == 1
    assert progress.advance([7, 8])[0] == 7
    assert progress.error is None
    assert progress.advance([9])[0] == 7
    assert progress.error == "it is too complex"


def test_a_sequence_whose_grammar_gives_up_fails_alone_and_the_grammar_is_compiled_anew(model: Persimmon) -> None:
    compiler = CountingCompiler()
    harness = Harness(model, num_blocks=20, grammars=compiler)  # type: ignore[arg-type]
    other = Sequence("other", [5, 6], 9, sampling=GREEDY)
    alone = Harness(model, num_blocks=20).generate([[5, 6]], 9)[0].token_ids
    asked = SamplingParams(temperature=0.0, grammar=GrammarSpec("regex", "a"))
    limited = [Sequence(number, [5, 7], 9, sampling=asked) for number in range(2)]
    harness.run([limited[0], other])
    assert other.token_ids == alone
    assert harness.failures == {limited[0]: "it is too complex"}
    assert limited[0].finish_reason == "abort"
    harness.run([limited[1]])
    assert len(compiler.compiled) == 2


def test_nothing_of_a_sequence_is_kept_after_its_end(
    model: Persimmon, tokenizer: Tokenizer, config: PersimmonConfig, grammars: GrammarCompiler
) -> None:
    harness = Harness(model, num_blocks=60, grammars=grammars, speculation=Speculation(), guess_forced=True)
    sequence = constrained(tokenizer, config, 1, GrammarSpec("regex", "a{4}"), forks=2, frequency_penalty=0.1)
    left = [weakref.ref(own) for own in sequence.family]
    harness.run([sequence])
    harness.reports.clear()
    del sequence
    gc.collect()
    assert [reference() for reference in left] == [None] * 3
