"""One executor for each kind of device; the runner and the loader see what `Executor` shows and no kind."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from persimmon import kernels
from persimmon.kernels import StepLimits, reference
from persimmon.kernels.cpu import library
from persimmon.kernels.fused import FusedKernels
from persimmon.model.config import PersimmonConfig
from persimmon.model.executor import Executor, NativeExecutor, TorchExecutor, executor_for
from persimmon.model.fused_executor import FusedExecutor
from persimmon.model.graph_sizes import graph_bytes
from persimmon.model.persimmon import Persimmon, Step
from persimmon.model.runner import Runner, SequenceInput
from persimmon.model.sampler import Samples
from tests.engine_harness import CPU, load_model, poisoned_cache
from tests.model.rows import row_with

GREEDY = (row_with(),)
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def model(random_checkpoint: Path) -> Persimmon:
    return load_model(random_checkpoint, operations=reference)


class TestChoice:
    @pytest.mark.skipif(not library.builds(), reason="no build of the C kernels for this processor")
    def test_is_the_recorded_program_where_there_are_c_kernels(self) -> None:
        executor = executor_for(kernels.for_device(CPU), CPU, [1, 2])
        assert isinstance(executor, NativeExecutor)
        assert f"{library.builds()[0]} kernels" in executor.name

    def test_is_plain_torch_where_there_are_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(library, "builds", list)
        executor = executor_for(kernels.for_device(CPU), CPU)
        assert isinstance(executor, TorchExecutor)
        assert "plain torch" in executor.name

    def test_is_graphs_on_a_gpu(self) -> None:
        executor = executor_for(FusedKernels(GPU), GPU, [1, 2])
        assert isinstance(executor, FusedExecutor)
        assert executor.preparation == "CUDA graphs"
        assert executor_for(FusedKernels(GPU), GPU).preparation is None


def test_only_a_gpu_overlaps_steps_and_compiles_them(model: Persimmon) -> None:
    del model
    assert {kind: (kind.overlaps, kind.compiles) for kind in (TorchExecutor, NativeExecutor, FusedExecutor)} == {
        TorchExecutor: (False, False),
        NativeExecutor: (False, False),
        FusedExecutor: (True, True),
    }


def test_graphs_count_among_the_step_buffers(random_checkpoint: Path) -> None:
    config = PersimmonConfig.from_folder(random_checkpoint)
    limits = StepLimits(4, 64, 256, config.num_attention_heads, config.head_dim, config.hidden_size, 512, 4096)
    operations = FusedKernels(CPU)
    with_graphs, eager = FusedExecutor(operations, [1, 4]), FusedExecutor(operations)
    assert eager.step_buffers(config, torch.float16, limits) == operations.workspace_bytes(limits)
    more = with_graphs.step_buffers(config, torch.float16, limits) - operations.workspace_bytes(limits)
    assert more == graph_bytes(config, torch.float16, [1, 4], [16, 32, 64]) > graph_bytes(config, torch.float16, [1, 4])


class TwoWays(TorchExecutor):
    """Draws token 7 for every step of single sequences, and leaves all others to the network."""

    forwarded = 0
    fetched = 0

    def decode(self, batch: Sequence[SequenceInput]) -> Samples | None:
        return Samples(torch.tensor([7])) if len(batch) == 1 else None

    def forward(self, step: Step) -> torch.Tensor:
        self.forwarded += 1
        return super().forward(step)

    def fetch(self, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.cuda.Event | None]:
        self.fetched += 1
        return super().fetch(tensors)


def test_the_runner_asks_the_executor_for_a_faster_way_first(model: Persimmon) -> None:
    executor = TwoWays(reference).start(model, poisoned_cache(model, 4, 16))
    runner = Runner(executor)
    parts = [SequenceInput([3], 0, [0], GREEDY), SequenceInput([4], 0, [1], GREEDY)]
    assert runner.run(parts[:1]) == [7]
    assert (executor.forwarded, executor.fetched) == (0, 1)
    expected = Runner(TorchExecutor(reference).start(model, poisoned_cache(model, 4, 16))).run(parts)
    assert runner.run(parts) == expected
    assert (executor.forwarded, executor.fetched) == (1, 2)


def test_steps_of_each_kind_of_cpu_begin_with_the_tokens_of_the_last(
    random_checkpoint: Path, cpu_kernels: kernels.Kernels
) -> None:
    own = load_model(random_checkpoint, operations=cpu_kernels)

    def start() -> Runner:
        executor: Executor = executor_for(cpu_kernels, CPU).start(own, poisoned_cache(own, 4, 16))
        return Runner(executor)

    known, unseen = start(), start()
    (first,) = known.run([SequenceInput([3, 4, 5], 0, [0], GREEDY)])
    unseen.launch([SequenceInput([3, 4, 5], 0, [0], GREEDY)])
    assert unseen.run([SequenceInput([-1], 3, [0], GREEDY)]) == known.run([SequenceInput([first], 3, [0], GREEDY)])
