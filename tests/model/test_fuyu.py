"""The engine against Transformers' FuyuForCausalLM, in float32 on the CPU, greedily, on prompts with images.

Batching, chunking, prefix hits and preemption change speed, never tokens.
"""

import random
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from persimmon import kernels
from persimmon.model.persimmon import Persimmon
from persimmon.server.engine.sequence import Sequence
from tests.engine_harness import GREEDY, Harness, blocks_for, load_model, new_tokens, poisoned_cache, runner_of
from tests.fuyu import (
    BOS,
    ImagePrompt,
    continue_greedily,
    load_transformers,
    make_fuyu,
    random_image,
    transformers_logits,
)
from tests.model.test_patches import part
from tests.model.transformers_reference import NEAR_TIE
from tests.ranks import harness_on, on_ranks

NEW_TOKENS = 12
BLOCK_SIZE = 16
# Rows and columns of the images of each prompt, 24 in all; none is for text only.
SIZES: Ids[Ids[tuple[int, int]]] = (
    *([(1, 1)], [(1, 17)], [(23, 1)], [(3, 5), (2, 2)], [(7, 7)], [(1, 1), (1, 1), (2, 1)], []),
    *([(5, 3)], [(4, 16)], [(2, 31)], [(6, 5), (5, 6)], [(1, 2), (3, 4), (4, 3), (2, 1)], [(9, 2)]),
    *([(2, 9), (1, 64)], [(13, 3), (1, 3)], [(3, 13)]),
)


@dataclass(frozen=True)
class Case:
    """A checkpoint, loaded, and what Transformers makes of prompts with images for it."""

    folder: Path
    model: Persimmon
    prompts: list[ImagePrompt]
    outputs: list[list[int]]
    logits: list[torch.Tensor]

    def sequences(self) -> list[Sequence]:
        return [sequence(number, prompt) for number, prompt in enumerate(self.prompts)]

    def blocks(self) -> int:
        """Blocks that all sequences need side by side."""
        return blocks_for([len(prompt.token_ids) + NEW_TOKENS for prompt in self.prompts], BLOCK_SIZE)

    def harness(self, num_blocks: int | None = None, **options: Any) -> Harness:
        return Harness(self.model, num_blocks=num_blocks or self.blocks(), block_size=BLOCK_SIZE, **options)

    def run(self, harness: Harness, arrivals: Ids[int] | None = None) -> list[Sequence]:
        """Runs all prompts, and compares their tokens."""
        sequences = self.sequences()
        harness.run(sequences, arrivals)
        assert [new_tokens(own) for own in sequences] == self.outputs
        return sequences


def sequence(key: object, prompt: ImagePrompt) -> Sequence:
    return Sequence(key, list(prompt.token_ids), NEW_TOKENS, sampling=GREEDY, spans=prompt.spans)


def candidate(sizes: Ids[tuple[int, int]], seed: int) -> ImagePrompt:
    """Text and images in turn; each image is followed by a document's beginning, as FuyuProcessor has it."""
    draw = random.Random(seed)

    def text() -> list[int]:
        return draw.choices(range(2, 4096), k=draw.randint(1, 12))

    parts = [
        part for number, size in enumerate(sizes) for part in (random_image(*size, 9 * seed + number), [BOS], text())
    ]
    return ImagePrompt.of(*([BOS], text()) if seed % 2 else (), *parts or [text()])


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Prompts without near-ties in what follows them."""
    folder = make_fuyu(tmp_path_factory.mktemp("fuyu"))
    transformers = load_transformers(folder)
    prompts, outputs, logits = [], [], []
    for number, sizes in enumerate(SIZES):
        for seed in range(number, 1000, len(SIZES)):
            prompt = candidate(sizes, seed)
            output = continue_greedily(transformers, prompt, NEW_TOKENS)
            rows = transformers_logits(transformers, prompt, output)
            best = rows[len(prompt.token_ids) - 1 : -1].topk(2).values
            if bool((best[:, 0] - best[:, 1] > NEAR_TIE).all()):
                break
        prompts.append(prompt)
        outputs.append(output)
        logits.append(rows)
    return Case(folder=folder, model=load_model(folder), prompts=prompts, outputs=outputs, logits=logits)


def test_the_reference_is_worth_comparing_with(case: Case) -> None:
    assert sum(map(len, SIZES)) == 24
    for prompt, output in zip(case.prompts, case.outputs, strict=True):
        assert len(set(output)) >= NEW_TOKENS // 2
        if prompt.spans:
            others = ImagePrompt(prompt.token_ids, prompt.spans, [255 - own for own in prompt.pixels])
            last = transformers_logits(load_transformers(case.folder), others)[-1]
            assert not torch.allclose(
                last, case.logits[case.prompts.index(prompt)][len(prompt.token_ids) - 1], atol=0.1
            )


@pytest.mark.parametrize("chunk", [1000, 37, 16, 5])
def test_logits_equal_transformers_in_chunks_of_any_size(case: Case, chunk: int) -> None:
    for prompt, expected in zip(case.prompts, case.logits, strict=True):
        length = len(prompt.token_ids)
        runner = runner_of(case.model, poisoned_cache(case.model, 12, BLOCK_SIZE))
        steps = [part(prompt, start, min(start + chunk, length), table=range(12)) for start in range(0, length, chunk)]
        for step in steps[:-1]:
            runner.run([step])
        logits = runner.logits(steps[-1:])
        torch.testing.assert_close(logits[0], expected[length - 1], rtol=0, atol=1e-4)


def test_greedy_tokens_equal_transformers_side_by_side(case: Case) -> None:
    harness = case.harness()
    case.run(harness)
    assert harness.stats.steps == NEW_TOKENS


def test_in_plain_torch_too(case: Case) -> None:
    model = load_model(case.folder, operations=kernels.reference)
    case.run(Harness(model, num_blocks=case.blocks(), block_size=BLOCK_SIZE, operations=kernels.reference))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("tokens", [7, 48])
def test_chunks_through_the_middle_of_rows_among_decodes_give_the_same_tokens(
    case: Case, tokens: int, overlap: bool
) -> None:
    harness = case.harness(max_num_batched_tokens=tokens, max_num_seqs=5, overlap=overlap)
    case.run(harness, arrivals=range(0, 3 * len(case.prompts), 3))


def test_the_same_image_comes_from_the_cache_and_another_of_its_size_does_not(case: Case) -> None:
    harness = case.harness(2 * case.blocks(), prefix_caching=True)
    case.run(harness)
    for own in case.run(harness):
        assert own.cached_tokens == (own.prompt_length - 1) // BLOCK_SIZE * BLOCK_SIZE
    images = [random_image(4, 20, seed) for seed in (1, 2)]
    images[1][:2] = images[0][:2]
    # Equal tops of images are the same blocks.
    sequences = [sequence(number, ImagePrompt.of(image, [BOS, 7])) for number, image in enumerate(images)]
    for own in sequences:
        harness.run([own])
    assert [own.cached_tokens for own in sequences] == [0, 2 * 21 // BLOCK_SIZE * BLOCK_SIZE]
    transformers = load_transformers(case.folder)
    for own, image in zip(sequences, images, strict=True):
        assert new_tokens(own) == continue_greedily(transformers, ImagePrompt.of(image, [BOS, 7]), NEW_TOKENS)


@pytest.mark.parametrize("overlap", [False, True])
def test_preempted_prompts_get_their_images_again(case: Case, overlap: bool) -> None:
    harness = case.harness(num_blocks=16, typical_output=1, max_num_batched_tokens=40, overlap=overlap)
    case.run(harness)
    assert harness.stats.preemptions > 0


def test_samples_of_a_prompt_share_its_images(case: Case) -> None:
    harness = case.harness()
    prompt, output = case.prompts[3], case.outputs[3]
    first = sequence(0, prompt)
    first.forks = [sequence(number, prompt) for number in (1, 2)]
    for fork in first.forks:
        fork.leader = first
    family = first.family
    harness.run([first])
    assert [new_tokens(own) for own in family] == [output] * 3


def test_two_ranks_get_the_pixels_of_each_step(case: Case) -> None:
    with on_ranks(2, case.folder) as loaded:
        for tokens in (512, 33):
            case.run(harness_on(loaded, max_num_batched_tokens=tokens))
