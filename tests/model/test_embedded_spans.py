"""Tokens whose embeddings come from elsewhere than the table, on every kind of device."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from persimmon.kernels import Kernels, reference
from persimmon.kernels.cpu import library
from persimmon.kernels.cpu.native import NativeKernels
from persimmon.kernels.fused import FusedKernels
from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.executor import Executor, NativeExecutor, TorchExecutor
from persimmon.model.fused_executor import FusedExecutor
from persimmon.model.persimmon import EmbeddedSpan, Persimmon
from persimmon.model.runner import PooledStates, Runner, SequenceInput
from tests.engine_harness import CPU, poisoned_cache
from tests.model import transformers_reference
from tests.model.checkpoints import make_checkpoint
from tests.model.rows import row_with
from tests.model.test_products import LIMITS

GREEDY = (row_with(),)
PROMPT = random.Random(1).choices(range(2, 130), k=40)
TABLE = [4, 0, 2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("two-layers"),
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=2,
        intermediate_size=192,
        vocab_size=130,
    )


@pytest.fixture(params=["plain torch", "C kernels", "fused kernels"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "C kernels" and not library.builds():
        pytest.skip("no build of the C kernels for this processor")
    return str(request.param)


def make_executor(kind: str) -> Executor:
    if kind == "plain torch":
        return TorchExecutor(reference)
    if kind == "C kernels":
        return NativeExecutor(NativeKernels(library.builds()[0]))
    executor = FusedExecutor(FusedKernels(CPU), [4])
    executor.reserve(LIMITS)
    return executor


def load(folder: Path, kernels: Kernels[Any, Any]) -> Persimmon:
    config = PersimmonConfig.from_folder(folder)
    return Persimmon(config, Checkpoint.open(folder, config).tensors(), torch.float32, CPU, kernels)


def start(folder: Path, kind: str) -> Runner:
    executor = make_executor(kind)
    model = load(folder, executor.kernels)
    return Runner(executor.start(model, poisoned_cache(model, 8, 16)))


def embeddings(folder: Path) -> torch.Tensor:
    """[vocab_size, hidden] float32, as the checkpoint has them."""
    config = PersimmonConfig.from_folder(folder)
    return dict(Checkpoint.open(folder, config).tensors())["model.embed_tokens.weight"].float()


def states(runner: Runner, ids: list[int], spans: list[EmbeddedSpan]) -> torch.Tensor:
    """The final states of a prompt: [T, hidden]."""
    report = PooledStates(range(len(ids)), total=False)
    result = runner.launch([SequenceInput(ids, 0, TABLE, (), report, embedded=spans)]).wait()
    return torch.frombuffer(bytearray(result.pooled[0]), dtype=torch.float32).view(len(ids), -1)


def test_with_the_rows_of_the_table_they_are_what_the_table_gives(checkpoint: Path, kind: str) -> None:
    runner, table = start(checkpoint, kind), embeddings(checkpoint)
    expected = states(runner, PROMPT, [])
    spans = [EmbeddedSpan(3, table[PROMPT[3:9]]), EmbeddedSpan(20, table[PROMPT[20:40]])]
    elsewhere = [0 if 3 <= place < 9 or place >= 20 else token for place, token in enumerate(PROMPT)]
    torch.testing.assert_close(states(runner, elsewhere, spans), expected, rtol=1e-5, atol=1e-5)
    # The ids that stand in their place do not give that.
    assert not torch.allclose(states(runner, elsewhere, []), expected, atol=1e-2)


def test_with_other_vectors_the_network_is_transformers(checkpoint: Path, kind: str) -> None:
    vectors = torch.randn(12, 64, generator=torch.Generator().manual_seed(2))
    inputs = embeddings(checkpoint)[torch.tensor(PROMPT)].clone()
    inputs[5:17] = vectors
    transformers = transformers_reference.load(checkpoint)
    with torch.inference_mode():
        expected = transformers(inputs_embeds=inputs[None]).logits[0, -1]
    runner = start(checkpoint, kind)
    logits = runner.logits([SequenceInput(PROMPT, 0, TABLE, GREEDY, embedded=[EmbeddedSpan(5, vectors)])])
    torch.testing.assert_close(logits[0], expected.float(), rtol=1e-4, atol=1e-4)


def test_a_prompt_in_chunks_among_others_gets_the_same_tokens(checkpoint: Path, kind: str) -> None:
    vectors = torch.randn(12, 64, generator=torch.Generator().manual_seed(2))
    whole = SequenceInput(PROMPT, 0, TABLE, GREEDY, embedded=[EmbeddedSpan(5, vectors)])
    expected = start(checkpoint, kind).logits([whole])
    runner = start(checkpoint, kind)
    other = SequenceInput([3, 4, 5], 0, [1], GREEDY)
    # The span lies in two chunks; the second comes behind the tokens of another sequence.
    first = SequenceInput(PROMPT[:9], 0, TABLE, (), embedded=[EmbeddedSpan(5, vectors[:4])])
    assert runner.run([other, first]) == start(checkpoint, kind).run([other])
    last = SequenceInput(PROMPT[9:], 9, TABLE, GREEDY, embedded=[EmbeddedSpan(0, vectors[4:])])
    torch.testing.assert_close(runner.logits([last]), expected, rtol=1e-4, atol=1e-4)


def test_a_single_token_may_be_embedded_too(checkpoint: Path, kind: str) -> None:
    vector, table = torch.randn(1, 64, generator=torch.Generator().manual_seed(4)), embeddings(checkpoint)
    by_table, by_span, by_other = (start(checkpoint, kind) for _ in range(3))
    expected = by_table.run([SequenceInput([9], 0, TABLE, GREEDY)])
    assert by_span.run([SequenceInput([0], 0, TABLE, GREEDY, embedded=[EmbeddedSpan(0, table[9:10])])]) == expected
    # Such as a prompt's last chunk; it is no decode step, whose inputs are token ids only.
    single = SequenceInput([0], 0, TABLE, GREEDY, embedded=[EmbeddedSpan(0, vector)])
    logits = by_other.logits([single])
    assert by_other.run([single]) == logits.argmax(-1).tolist()
    assert not torch.allclose(logits, by_table.logits([SequenceInput([9], 0, TABLE, GREEDY)]), atol=1e-2)


@pytest.mark.parametrize(
    "span",
    [EmbeddedSpan(38, torch.zeros(3, 64)), EmbeddedSpan(0, torch.zeros(3, 63))],
    ids=["beyond the end", "too narrow"],
)
def test_a_span_that_does_not_fit_is_refused(checkpoint: Path, kind: str, span: EmbeddedSpan) -> None:
    with pytest.raises(ValueError, match=r"a step of 40 tokens takes \[n, 64\] within it"):
        start(checkpoint, kind).run([SequenceInput(PROMPT, 0, TABLE, GREEDY, embedded=[span])])
