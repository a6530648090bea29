"""Tokens that stand for image patches, on every kind of device, against Transformers."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from persimmon.kernels import Kernels, reference
from persimmon.kernels.cpu import library
from persimmon.kernels.cpu.native import NativeKernels
from persimmon.kernels.fused import FusedKernels
from persimmon.kernels.invariant import InvariantKernels
from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.executor import Executor, NativeExecutor, TorchExecutor
from persimmon.model.fused_executor import FusedExecutor
from persimmon.model.patches import PATCHES_AT_ONCE, PatchSpan, inputs_of
from persimmon.model.persimmon import Persimmon
from persimmon.model.runner import PooledStates, Runner, SequenceInput
from tests.engine_harness import CPU, poisoned_cache
from tests.fuyu import SPEAKER, VOCAB_SIZE, ImagePrompt, load_transformers, make_fuyu, random_image, transformers_logits
from tests.model.checkpoints import make_checkpoint
from tests.model.rows import row_with
from tests.model.test_products import LIMITS

GREEDY = (row_with(),)
TABLE = [4, 0, 2]
PATCH = 4 * 4 * 3
IMAGES = [random_image(2, 5, 1, PATCH), random_image(1, 7, 2, PATCH)]
PROMPT = ImagePrompt.of([7, 8, 9], IMAGES[0], [10, 11], IMAGES[1], [12, 13, 14, 15])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fuyu(tmp_path_factory.mktemp("fuyu"), patch_size=4)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> torch.Tensor:
    """[T, vocab_size], the logits of PROMPT."""
    return transformers_logits(load_transformers(checkpoint), PROMPT)


@pytest.fixture(params=["plain torch", "C kernels", "fused kernels", "invariant kernels"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "C kernels" and not library.builds():
        pytest.skip("no build of the C kernels for this processor")
    return str(request.param)


def make_executor(kind: str) -> Executor:
    if kind == "plain torch":
        return TorchExecutor(reference)
    if kind == "C kernels":
        return NativeExecutor(NativeKernels(library.builds()[0]))
    executor = FusedExecutor(FusedKernels(CPU) if kind == "fused kernels" else InvariantKernels(CPU), [4])
    executor.reserve(replace(LIMITS, vocab_size=VOCAB_SIZE))
    return executor


def load(folder: Path, kernels: Kernels[Any, Any]) -> Persimmon:
    config = PersimmonConfig.from_folder(folder)
    return Persimmon(config, Checkpoint.open(folder, config).tensors(), torch.float32, CPU, kernels)


def start(folder: Path, kind: str) -> Runner:
    executor = make_executor(kind)
    model = load(folder, executor.kernels)
    return Runner(executor.start(model, poisoned_cache(model, 8, 16)))


def part(prompt: ImagePrompt, start: int, end: int, table: Sequence[int] = TABLE) -> SequenceInput:
    """Some of a prompt's tokens, of which the last is drawn after where it is the prompt's."""
    spans = []
    for span in prompt.spans:
        first, stop = max(span.start, start), min(span.end, end)
        if first < stop:
            pixels = np.frombuffer(span.pixels, np.uint8).reshape(span.length, -1)
            spans.append(PatchSpan(first - start, pixels[first - span.start : stop - span.start]))
    drawn = GREEDY if end == len(prompt.token_ids) else ()
    return SequenceInput(prompt.token_ids[start:end], start, table, drawn, patches=spans)


def test_logits_are_those_of_transformers(checkpoint: Path, kind: str, expected: torch.Tensor) -> None:
    logits = start(checkpoint, kind).logits([part(PROMPT, 0, len(PROMPT.token_ids))])
    torch.testing.assert_close(logits[0], expected[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cut", [4, 5, 9, 24])  # after a row's first patch, in its middle, at its end and in the text
def test_a_prompt_in_chunks_among_others_has_the_same_logits(
    checkpoint: Path, kind: str, expected: torch.Tensor, cut: int
) -> None:
    runner, other = start(checkpoint, kind), SequenceInput([3, 4, 5], 0, [1], GREEDY)
    assert runner.run([other, part(PROMPT, 0, cut)]) == start(checkpoint, kind).run([other])
    logits = runner.logits([part(PROMPT, cut, len(PROMPT.token_ids))])
    torch.testing.assert_close(logits[0], expected[-1], rtol=1e-4, atol=1e-4)


def test_the_last_token_may_be_a_patch(checkpoint: Path, kind: str) -> None:
    """A step with images is not a decode step, whose inputs are token ids only."""
    prompt = ImagePrompt.of([7, 8], random_image(1, 1, 3, PATCH))
    del prompt.token_ids[-1]  # the newline
    expected = transformers_logits(load_transformers(checkpoint), prompt)
    runner = start(checkpoint, kind)
    runner.run([part(prompt, 0, 2)])
    assert runner.run([part(prompt, 2, 3)]) == [int(expected[-1].argmax())]


@pytest.mark.skipif(not library.builds(), reason="no build of the C kernels for this processor")
def test_more_patches_than_are_projected_at_once_have_the_bits_that_each_has_alone(checkpoint: Path) -> None:
    model = load(checkpoint, NativeKernels(library.builds()[0]))
    count = PATCHES_AT_ONCE + 5
    image = random_image(1, count, 4, PATCH)
    runner = Runner(NativeExecutor(NativeKernels(library.builds()[0])).start(model, poisoned_cache(model, 20, 16)))

    def states(pixels: np.ndarray) -> torch.Tensor:
        """The final states, of which each depends on those before it too."""
        report = PooledStates(range(len(pixels)), total=False)
        step = SequenceInput([SPEAKER] * len(pixels), 0, range(20), (), report, patches=[PatchSpan(0, pixels)])
        result = runner.launch([step]).wait().pooled[0]
        return torch.frombuffer(bytearray(result), dtype=torch.float32).view(len(pixels), -1)

    whole = states(image[0])
    assert torch.equal(states(image[0, :3]), whole[:3])
    assert torch.equal(states(image[0, : PATCHES_AT_ONCE + 1]), whole[: PATCHES_AT_ONCE + 1])


def test_pixels_go_from_minus_one_to_one_and_zeros_fill_the_last_16_bytes() -> None:
    inputs = inputs_of(torch.tensor([[0, 255, 51]], dtype=torch.uint8), torch.float32)
    assert inputs[0].tolist() == pytest.approx([-1, 1, -0.6, *[0] * 13])


@pytest.mark.parametrize(
    "span",
    [PatchSpan(25, np.zeros((9, PATCH), np.uint8)), PatchSpan(0, np.zeros((3, PATCH - 1), np.uint8))],
    ids=["beyond the end", "too few numbers"],
)
def test_patches_that_do_not_fit_are_refused(checkpoint: Path, span: PatchSpan) -> None:
    ids = PROMPT.token_ids
    with pytest.raises(ValueError, match=rf"expected \[n, {PATCH}\] within the {len(ids)} tokens"):
        start(checkpoint, "plain torch").run([SequenceInput(ids, 0, TABLE, GREEDY, patches=[span])])


def test_a_network_that_reads_text_only_refuses_patches(tmp_path: Path) -> None:
    runner = start(make_checkpoint(tmp_path, num_hidden_layers=1, vocab_size=130), "plain torch")
    with pytest.raises(ValueError, match=r"expected \[n, 0\]"):
        runner.run([SequenceInput([1], 0, TABLE, GREEDY, patches=[PatchSpan(0, np.zeros((1, PATCH), np.uint8))])])
