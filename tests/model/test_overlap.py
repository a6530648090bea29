"""Launching a step waits for nothing, and what comes of it is read from host memory only, whatever it reports.

A copy that blocks, or a result fetched behind the step that was launched since, ends the overlap of every sequence of
the batch.  Steps run on meta tensors here, which stand for a GPU's; kernels are not run.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from persimmon.kernels import StepLimits
from persimmon.kernels.fused import FusedKernels
from persimmon.model.checkpoint import expected_shapes
from persimmon.model.config import Architecture, PersimmonConfig
from persimmon.model.fused_executor import FusedExecutor
from persimmon.model.host_copy import pack, unpack
from persimmon.model.kv_cache import KVCache
from persimmon.model.logprobs import LogprobRows
from persimmon.model.persimmon import Persimmon
from persimmon.model.rope_scaling import RopeScaling
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import PooledStates, PromptLogprobs, Report, Runner, SequenceInput
from persimmon.model.token_counts import TokenCounts
from tests.model.rows import row_with

META = torch.device("meta")
BLOCK_SIZE, MAX_NUM_SEQS, MAX_MODEL_LEN = 16, 8, 256
GREEDY = row_with()


class Lists(TorchFunctionMode):
    """Records tensors made on the device of lists, which is a copy from pageable memory that no dispatch shows."""

    def __init__(self) -> None:
        super().__init__()
        self.blocking: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and out.device.type == "meta":
            self.blocking.append(f"torch.{func.__name__}")
        return out


class Transfers(TorchDispatchMode):
    """Records operations that touch the device, and the copies between it and the host that block."""

    def __init__(self) -> None:
        super().__init__()
        self.on_device: list[str] = []
        self.blocking: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)}
        if "meta" in devices:
            self.on_device.append(str(func))
        non_blocking = kwargs.get("non_blocking") or (func is torch.ops.aten.copy_.default and args[2:] == (True,))
        if devices == {"cpu", "meta"} and not non_blocking:
            self.blocking.append(str(func))
        return out


class Event:
    """Stands for a GPU's, and counts how often it is waited for."""

    waits = 0

    def synchronize(self) -> None:
        self.waits += 1


class Executor(FusedExecutor):
    """Sends nothing: host memory holds zeros from the start."""

    def _send(self, words: torch.Tensor) -> tuple[torch.Tensor, Any]:
        self.event, self.sends = Event(), getattr(self, "sends", 0) + 1
        return torch.zeros(words.shape, dtype=words.dtype), self.event


@pytest.fixture(autouse=True)
def no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GridExecutor, "__call__", lambda *args, **kwargs: None)


def executor_of(architecture: Architecture = Architecture.CAUSAL_LM, **changes: Any) -> Executor:
    config = PersimmonConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=MAX_MODEL_LEN,
        architecture=architecture,
        labels=() if architecture is Architecture.CAUSAL_LM else ("calm", "glad"),
        **changes,
    )
    kernels = FusedKernels(META)
    executor = Executor(kernels, [MAX_NUM_SEQS] if config.generates else (), guesses=2)
    vocab_size = config.vocab_size if config.generates else 0
    executor.reserve(StepLimits(MAX_NUM_SEQS, 512, MAX_MODEL_LEN, 2, 32, 64, 128, vocab_size))
    tensors = ((name, torch.empty(shape, device=META)) for name, shape in expected_shapes(config).items())
    model = Persimmon(config, tensors, torch.float16, META, kernels, MAX_MODEL_LEN)
    return executor.start(model, KVCache.allocate(config, 64, BLOCK_SIZE, torch.float16, META))


def sequence(
    count: int, sampling: RowSampling | None = GREEDY, report: Report | None = None, prompt_length: int = 0
) -> SequenceInput:
    samplings = () if sampling is None else (sampling,)
    return SequenceInput([3] * count, 20, range(-(-(20 + count) // BLOCK_SIZE)), samplings, report, prompt_length)


def with_guesses(*samplings: RowSampling) -> SequenceInput:
    """A token and guesses, at all of which is drawn."""
    return replace(sequence(len(samplings)), samplings=samplings, guesses=len(samplings) - 1)


def allowed() -> np.ndarray:
    return np.full(8, -1, dtype=np.int32)


DRAWS = {
    "greedy": GREEDY,
    "top-k, top-p, min-p": row_with(temperature=1.0, top_k=5, top_p=0.9, min_p=0.1),
    "logprobs": row_with(logprobs=0),
    "logprobs of several": row_with(temperature=1.0, logprobs=5),
    "penalties": row_with(seen=TokenCounts([1, 2]), repetition_penalty=1.5, presence_penalty=1.0),
    "bias and bans": row_with(logit_bias={7: 1.0}, banned=(1, 2)),
    "a grammar": row_with(allowed=allowed),
    "all at once": row_with(
        temperature=1.0, top_p=0.5, logit_bias={7: 1.0}, logprobs=3, seen=TokenCounts([1]), allowed=allowed
    ),
}
REPORTS: dict[str, Report] = {
    "prompt logprobs": PromptLogprobs(0, [4] * 20, 0),
    "prompt logprobs of several": PromptLogprobs(3, [4] * 17, 5),
    "pooled states": PooledStates(range(20), total=False),
    "the sum of pooled states": PooledStates(range(20), total=True),
}
STEPS: dict[str, Sequence[SequenceInput]] = {
    **{f"decodes, {name}": [sequence(1), sequence(1, own)] for name, own in DRAWS.items()},
    **{f"guesses, {name}": [sequence(1), with_guesses(GREEDY, own, own)] for name, own in DRAWS.items()},
    "guesses next to a prompt": [with_guesses(GREEDY, GREEDY), sequence(20)],
    **{f"mixed, {name}": [sequence(20, own), sequence(1), sequence(1, own)] for name, own in DRAWS.items()},
    **{f"a prompt, {name}": [sequence(20, GREEDY, own), sequence(1)] for name, own in REPORTS.items()},
    **{f"part of a prompt, {name}": [sequence(20, None, own)] for name, own in REPORTS.items()},
    "a long step": [sequence(90), sequence(1)],
}


def step(executor: Executor, batch: Sequence[SequenceInput]) -> None:
    """Launches a step and reads its outcome; no transfer may block, and one event is waited for."""
    runner = Runner(executor)
    with Lists() as lists, Transfers() as launching:
        pending = runner.launch(batch)
    assert launching.on_device
    assert launching.blocking + lists.blocking == []
    # Tokens, log-probabilities and states travel together, before the one event.
    assert executor.sends == 1
    assert executor.event.waits == 0
    with Transfers() as waiting:
        outcome = pending.wait()
    assert executor.event.waits == 1
    assert waiting.on_device == []
    assert [len(tokens) for tokens in outcome.tokens] == [count for item in batch for count in item.draws]
    assert set(outcome.prompt_logprobs) | set(outcome.pooled) == {
        place for place, item in enumerate(batch) if item.report is not None
    }


@pytest.mark.parametrize("name", STEPS)
def test_a_step_blocks_nowhere_and_its_results_are_read_on_the_host(name: str) -> None:
    step(executor_of(), STEPS[name])


@pytest.mark.parametrize("total", [False, True])
def test_neither_do_scores(total: bool) -> None:
    report = PooledStates(range(20), total=total, scores=True)
    step(executor_of(Architecture.SEQUENCE_CLASSIFICATION), [sequence(20, None, report)])


def test_neither_do_prompts_whose_length_decides_their_frequencies() -> None:
    executor = executor_of(rope_scaling=RopeScaling(kind="dynamic", factor=8.0, original_length=16))
    step(executor, [sequence(20, prompt_length=200)])


@pytest.mark.parametrize(
    "fault",
    [
        lambda logits: torch.tensor([0], device=logits.device),
        lambda logits: torch.from_numpy(np.zeros(1)).to(logits.device),
        lambda logits: logits.new_zeros(1).copy_(torch.zeros(1)),
    ],
)
def test_a_copy_that_blocks_would_be_seen(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    of = LogprobRows.of
    monkeypatch.setattr(LogprobRows, "of", lambda logits, *rest: (fault(logits), of(logits, *rest))[1])
    with pytest.raises(AssertionError, match=r"torch\.tensor|aten\.(to|copy_)\."):
        step(executor_of(), STEPS["decodes, logprobs"])


def test_a_result_read_on_the_device_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Executor, "fetch", lambda self, tensors: (tensors, self._send(torch.empty(1))[1]))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        step(executor_of(), STEPS["decodes, logprobs"])


def test_packed_tensors_come_back_as_they_were() -> None:
    tensors = [
        torch.randn(3),
        torch.arange(5),
        torch.randn(2, 3, dtype=torch.float64),
        torch.empty(4, 0),
        torch.arange(7, dtype=torch.int32),
        torch.empty(2, 0, dtype=torch.int64),
    ]
    words = pack(tensors)
    assert words.dtype == torch.int32
    for own, back in zip(tensors, unpack(words, tensors), strict=True):
        assert torch.equal(own, back)
        assert own.dtype == back.dtype
    (alone,) = tensors[1:2]
    assert pack([alone]).data_ptr() == alone.data_ptr()
