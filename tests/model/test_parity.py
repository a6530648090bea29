"""The network and the engine against Transformers' PersimmonForCausalLM, in float32 on the CPU, greedily.

Batching, chunking, prefix hits and preemption change speed, never tokens.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from persimmon import kernels
from persimmon.kernels import Kernels
from persimmon.model.chat_format import Turn, render
from persimmon.model.persimmon import Persimmon
from persimmon.model.runner import SequenceInput
from persimmon.model.sampling_params import SamplingParams
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.sequence import Sequence
from tests.engine_harness import CPU, Harness, blocks_for, load_model, new_tokens, poisoned_cache, runner_of
from tests.model import transformers_reference
from tests.model.checkpoints import DEMO
from tests.model.rows import row_with
from tests.model.transformers_reference import GreedyReference

NEW_TOKENS = 64
NUM_PROMPTS = 32
LOGITS_TOLERANCE = 1e-4
# Around the borders of blocks of 16, 32 and 64.
PROMPT_LENGTHS = (1, 150, 5, 16, 77, 31, 32, 48)
QUESTIONS = ("What does {} mean?", "Define {}.", "What is a {}?", "Please explain the word {}.", "{}?")
FOLLOW_UPS = ("Give me a synonym.", "Use it in a sentence.", "Is it a noun or a verb?")
WORDS = (
    *("computer", "robot", "galaxy", "volcano", "penguin", "elephant", "guitar", "chocolate", "rainbow", "bicycle"),
    *("queue", "graph", "server", "river", "mountain", "window", "letter", "doctor", "garden", "bridge", "winter"),
    *("silence", "answer", "market", "village", "engine", "forest"),
)
OTHER_TEXTS = (
    *("human: Hello!\n\nadept:", "The quick brown fox", "\n"),
    *("Ein Café in 東京 🙂\t\n", "def f(x):\n    return x"),
)


@dataclass(frozen=True)
class Case:
    """A checkpoint, loaded, and what Transformers makes of prompts for it."""

    folder: Path
    operations: Kernels[Any, Any]
    model: Persimmon
    reference: GreedyReference

    def computed_by(self, operations: Kernels[Any, Any]) -> "Case":
        """The same, loaded for other operations."""
        return replace(self, operations=operations, model=load_model(self.folder, operations=operations))

    def harness(self, **options: Any) -> Harness:
        """An engine for it."""
        return Harness(self.model, operations=self.operations, **options)

    def some(self) -> GreedyReference:
        """A few prompts, short and long, for what runs them one by one."""
        return self.reference.select(range(0, NUM_PROMPTS, 5))

    def blocks(self, block_size: int = 16) -> int:
        """Blocks that all sequences need side by side."""
        return blocks_for([len(prompt) + NEW_TOKENS for prompt in self.reference.prompts], block_size)


def random_prompts() -> Iterator[list[int]]:
    """Token ids of many lengths; in each round one prompt begins like those of the other rounds."""
    beginning = random.Random(0).choices(range(2, 4096), k=40)
    for seed in range(6):
        for length in PROMPT_LENGTHS:
            yield random.Random(1000 * length + seed).choices(range(2, 4096), k=length)
        yield beginning + random.Random(seed).choices(range(2, 4096), k=1 + 3 * seed)


def dialogues() -> Iterator[list[int]]:
    """What people ask the demo, in one turn and in many, and text that is not a dialogue."""
    tokenizer = Tokenizer.from_folder(DEMO)
    for number, word in enumerate(WORDS):
        turns = [Turn("user", QUESTIONS[number % len(QUESTIONS)].format(word))]
        # Up to nine turns and 250 tokens.
        for earlier in range(number % 5 if number % 2 else 0):
            answer = f'"{word.capitalize()}" is a noun. It means a kind of {WORDS[earlier]}.'
            turns += [Turn("assistant", answer), Turn("user", FOLLOW_UPS[earlier % len(FOLLOW_UPS)])]
        yield tokenizer.encode(render(turns))
    for text in OTHER_TEXTS:
        yield tokenizer.encode(text)


@pytest.fixture(scope="module", params=["random", "demo"])
def case(request: pytest.FixtureRequest) -> Case:
    """Thirty-two prompts and their 64 greedy tokens, without near-ties in any of them."""
    folder: Path = request.getfixturevalue(f"{request.param}_checkpoint")
    candidates = list(random_prompts() if request.param == "random" else dialogues())
    transformers = transformers_reference.load(folder)
    reference = transformers_reference.continue_greedily(transformers, candidates, NEW_TOKENS).without_near_ties()
    if len(reference.prompts) < NUM_PROMPTS:
        pytest.fail(f"only {len(reference.prompts)} of {len(candidates)} prompts are without near-ties: add some")
    operations = kernels.for_device(CPU)
    return Case(
        folder=folder,
        operations=operations,
        model=load_model(folder, operations=operations),
        reference=reference.select(range(NUM_PROMPTS)),
    )


@pytest.fixture
def each_way(case: Case, cpu_kernels: Kernels[Any, Any]) -> Case:
    """The case in each of the ways in which a CPU computes."""
    return case.computed_by(cpu_kernels)


@pytest.fixture
def each_schedule(each_way: Case) -> Case:
    """The same with half of the prompts in plain torch, which takes three times as long, for what schedules change."""
    if each_way.operations is not kernels.reference:
        return each_way
    return replace(each_way, reference=each_way.reference.select(range(0, NUM_PROMPTS, 2)))


def test_the_reference_is_worth_comparing_with(case: Case) -> None:
    reference = case.reference
    for prompt, output, logits in zip(reference.prompts, reference.outputs, reference.logits, strict=True):
        assert len(output) == NEW_TOKENS
        assert output == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        # Text that went round in circles would hide mistakes.
        assert len(set(output)) >= 20
    lengths = [len(prompt) for prompt in reference.prompts]
    assert min(lengths) < 16
    assert max(lengths) > 128


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_greedy_tokens_equal_transformers(each_way: Case, block_size: int) -> None:
    reference = each_way.reference
    harness = each_way.harness(num_blocks=each_way.blocks(block_size), block_size=block_size)
    assert harness.outputs(reference.prompts, NEW_TOKENS) == reference.outputs
    # One step for all prompts and one more for each further token: they did run side by side.
    assert harness.stats.steps == NEW_TOKENS


class TestLogits:
    """Next-token logits after prefixes of prompt and output, computed in one piece, in two, and as a decode."""

    @pytest.mark.parametrize("cached", ["nothing", "half", "all but the last token"])
    @pytest.mark.parametrize("of_all", [0.0, 0.3, 0.6, 1.0])
    def test_equal_transformers(self, each_way: Case, cached: str, of_all: float) -> None:
        reference = each_way.reference
        runner = runner_of(each_way.model, poisoned_cache(each_way.model, each_way.blocks(), 16), each_way.operations)
        contexts, rests, expected = [], [], []
        first_block = 0
        for index, logits in enumerate(reference.logits):
            token_ids = reference.token_ids(index)[: max(1, round(of_all * len(logits)))]
            split = {"nothing": 0, "half": len(token_ids) // 2}.get(cached, len(token_ids) - 1)
            blocks = list(range(first_block, first_block + blocks_for([len(token_ids)], 16)))
            first_block += len(blocks)
            if split:
                contexts.append(SequenceInput(token_ids=token_ids[:split], start=0, block_table=blocks, samplings=()))
            rests.append(
                SequenceInput(token_ids=token_ids[split:], start=split, block_table=blocks, samplings=(row_with(),))
            )
            expected.append(logits[len(token_ids) - 1])
        if contexts:
            assert runner.run(contexts) == []
        torch.testing.assert_close(runner.logits(rests), torch.stack(expected), rtol=0, atol=LOGITS_TOLERANCE)


class TestChunks:
    @pytest.mark.parametrize("chunk", [1, 7, 64])
    def test_of_any_size_give_the_same_tokens(self, case: Case, chunk: int) -> None:
        some = case.some()
        harness = case.harness(num_blocks=case.blocks(), max_num_seqs=1, max_num_batched_tokens=chunk)
        assert harness.outputs(some.prompts, NEW_TOKENS) == some.outputs
        chunks = sum(-(-len(prompt) // chunk) for prompt in some.prompts)
        assert harness.stats.steps == chunks + (NEW_TOKENS - 1) * len(some.prompts)

    @pytest.mark.parametrize(("budget", "max_num_seqs"), [(7, 7), (64, 32)])
    def test_between_other_sequences_decodes_give_the_same_tokens(
        self, each_schedule: Case, budget: int, max_num_seqs: int
    ) -> None:
        harness = each_schedule.harness(
            num_blocks=each_schedule.blocks(), max_num_seqs=max_num_seqs, max_num_batched_tokens=budget
        )
        assert harness.outputs(each_schedule.reference.prompts, NEW_TOKENS) == each_schedule.reference.outputs


class TestBatches:
    @pytest.mark.parametrize("max_num_seqs", [1, 2, 7, 32])
    def test_of_any_size_and_order_of_arrival_give_the_same_tokens(self, case: Case, max_num_seqs: int) -> None:
        reference = case.some() if max_num_seqs == 1 else case.reference
        # Some together, some while others decode, in an order of their own for each size.
        arrivals = random.Random(max_num_seqs).choices(range(100), k=len(reference.prompts))
        harness = case.harness(num_blocks=case.blocks(), max_num_seqs=max_num_seqs)
        assert harness.outputs(reference.prompts, NEW_TOKENS, arrivals) == reference.outputs


class TestPrefixCache:
    @staticmethod
    def harness(case: Case) -> Harness:
        """A cache that need not forget anything."""
        return case.harness(num_blocks=3 * case.blocks(), prefix_caching=True)

    def test_cold_and_warm_give_the_same_tokens(self, each_schedule: Case) -> None:
        harness = self.harness(each_schedule)
        assert harness.outputs(each_schedule.reference.prompts, NEW_TOKENS) == each_schedule.reference.outputs
        warm = harness.generate(each_schedule.reference.prompts, NEW_TOKENS)
        assert [new_tokens(sequence) for sequence in warm] == each_schedule.reference.outputs
        # Everything that can be reused is: full blocks, the one with the last token excepted.
        assert [sequence.cached_tokens for sequence in warm] == [
            (len(prompt) - 1) // 16 * 16 for prompt in each_schedule.reference.prompts
        ]

    @pytest.mark.parametrize("length", [16, 32, 48])
    def test_a_wholly_cached_prompt_gives_the_same_tokens(self, case: Case, length: int) -> None:
        harness = self.harness(case)
        harness.generate(case.reference.prompts, NEW_TOKENS)
        # Prompts that end exactly with a block that is in the cache, its last token included.
        chosen = [index for index, prompt in enumerate(case.reference.prompts) if len(prompt) <= length]
        prompts = [case.reference.token_ids(index)[:length] for index in chosen]
        again = harness.generate(prompts, 16)
        assert {sequence.cached_tokens for sequence in again} == {length - 16}
        assert [sequence.token_ids for sequence in again] == [
            case.reference.token_ids(index)[: length + 16] for index in chosen
        ]

    def test_a_conversation_that_goes_on_gives_the_same_tokens(self, case: Case) -> None:
        harness = self.harness(case)
        harness.generate(case.reference.prompts, NEW_TOKENS)
        prompts = [
            prompt + output[:40] for prompt, output in zip(case.reference.prompts, case.reference.outputs, strict=True)
        ]
        again = harness.generate(prompts, NEW_TOKENS - 40)
        assert [new_tokens(sequence) for sequence in again] == [output[40:] for output in case.reference.outputs]
        assert all(
            sequence.cached_tokens == (len(prompt) - 1) // 16 * 16
            for sequence, prompt in zip(again, prompts, strict=True)
        )

    def test_a_known_block_after_another_beginning_is_not_reused(self, case: Case) -> None:
        one, other = (random.Random(seed).choices(range(2, 4096), k=33) for seed in (1, 2))
        harness = self.harness(case)
        harness.generate([one, other], 1)
        mixed = other[:16] + one[16:]
        (sequence,) = harness.generate([mixed], 16)
        assert sequence.cached_tokens == 16
        assert [new_tokens(sequence)] == case.harness(num_blocks=8).outputs([mixed], 16)

    def test_twins_that_share_blocks_while_they_run_give_the_same_tokens(self, case: Case) -> None:
        index = max(range(NUM_PROMPTS), key=lambda index: len(case.reference.prompts[index]))
        harness = self.harness(case)
        twins = harness.generate([case.reference.prompts[index]] * 12, NEW_TOKENS, arrivals=list(range(0, 48, 4)))
        assert [new_tokens(sequence) for sequence in twins] == [case.reference.outputs[index]] * 12
        assert all(sequence.cached_tokens for sequence in twins[1:])


class TestOverlap:
    """Each step launched before anybody has looked at the tokens of the one before, as on a GPU."""

    def test_gives_the_same_tokens(self, each_schedule: Case) -> None:
        reference = each_schedule.reference
        arrivals = random.Random(3).choices(range(100), k=len(reference.prompts))
        harness = each_schedule.harness(
            num_blocks=each_schedule.blocks(),
            max_num_seqs=16,
            max_num_batched_tokens=48,
            prefix_caching=True,
            overlap=True,
        )
        assert harness.outputs(reference.prompts, NEW_TOKENS, arrivals) == reference.outputs

    def test_with_preemption_gives_the_same_tokens(self, case: Case) -> None:
        harness = case.harness(num_blocks=round(0.3 * case.blocks()), prefix_caching=True, overlap=True)
        assert harness.outputs(case.reference.prompts, NEW_TOKENS) == case.reference.outputs
        assert harness.stats.preemptions > 0

    def test_draws_the_same_tokens_for_each_sample_and_penalty(self, case: Case) -> None:
        asked = [
            SamplingParams(temperature=0.8, seed=1),
            SamplingParams(temperature=0.0, frequency_penalty=0.3),
            SamplingParams(temperature=1.0, top_k=40, seed=2, min_tokens=5, logprobs=2),
        ]

        def tokens(*, overlap: bool) -> list[list[int]]:
            harness = case.harness(num_blocks=case.blocks(), prefix_caching=True, overlap=overlap)
            families = [
                Sequence(
                    (number, 0),
                    list(prompt),
                    20,
                    sampling=asked[number % 3],
                    forks=[
                        Sequence((number, index), list(prompt), 20, sampling=asked[number % 3], sample_index=index)
                        for index in (1, 2)
                    ],
                )
                for number, prompt in enumerate(case.some().prompts)
            ]
            everyone = [own for family in families for own in family.family]
            harness.run(families)
            return [own.token_ids for own in everyone]

        assert tokens(overlap=True) == tokens(overlap=False)


class TestPreemption:
    """With 30% of the KV blocks that the sequences would need side by side."""

    @staticmethod
    def harness(case: Case, *, prefix_caching: bool, max_num_batched_tokens: int = 2048) -> Harness:
        return case.harness(
            num_blocks=round(0.3 * case.blocks()),
            prefix_caching=prefix_caching,
            max_num_batched_tokens=max_num_batched_tokens,
        )

    @pytest.mark.parametrize(("budget", "prefix_caching"), [(48, True), (2048, False)])
    def test_preempted_sequences_yield_the_same_tokens(
        self, each_schedule: Case, budget: int, prefix_caching: bool
    ) -> None:
        harness = self.harness(each_schedule, prefix_caching=prefix_caching, max_num_batched_tokens=budget)
        assert harness.outputs(each_schedule.reference.prompts, NEW_TOKENS) == each_schedule.reference.outputs
        assert harness.stats.preemptions > 0

    def test_preempted_sequences_draw_the_same_tokens(self, case: Case) -> None:
        prompts = case.reference.prompts
        drawn = [SamplingParams(temperature=0.8, top_p=0.9, seed=seed) for seed in range(len(prompts))]
        roomy = case.harness(num_blocks=case.blocks())
        tight = self.harness(case, prefix_caching=True)
        expected = [sequence.token_ids for sequence in roomy.generate(prompts, NEW_TOKENS, sampling=drawn)]
        assert [sequence.token_ids for sequence in tight.generate(prompts, NEW_TOKENS, sampling=drawn)] == expected
        assert roomy.stats.preemptions == 0
        assert tight.stats.preemptions > 0
        # They did draw.
        greedy = [case.reference.token_ids(index) for index in range(NUM_PROMPTS)]
        assert sum(own != other for own, other in zip(expected, greedy, strict=True)) > NUM_PROMPTS // 2
