"""What only a GPU runs, from the engine's start to its steps, on a simulated one that computes real numbers.

Results are those of the same kernels on a CPU, where nothing is captured, queued or fetched.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Ids
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from persimmon.kernels import launch
from persimmon.kernels.fused import SMALL_STEP, FusedKernels
from persimmon.model import logprobs
from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.executor import Executor
from persimmon.model.fused_executor import FusedExecutor
from persimmon.model.memory import GPU_RESERVE, available_memory
from persimmon.model.persimmon import Persimmon
from persimmon.model.runner import PooledStates, PromptLogprobs, Runner, SequenceInput
from persimmon.model.sampling_params import SamplingParams
from persimmon.model.token_counts import TokenCounts
from persimmon.server.config import read_settings
from persimmon.server.engine import loading
from persimmon.server.engine.guesses import Speculation
from persimmon.server.engine.model_setup import limits_of
from persimmon.server.engine.profiling import ProfiledRunner
from persimmon.server.engine.proposers import Proposal
from persimmon.server.engine.sequence import Sequence
from tests.engine_harness import CPU, Harness, Reports, new_tokens, poisoned_cache
from tests.fake_cuda import FakeDevice, fake_cuda
from tests.fake_cuda.checkpoint import VOCAB_SIZE, write_checkpoint
from tests.fake_cuda.device import H200_BYTES
from tests.fake_cuda.gpu_code import executed_lines, gpu_statements
from tests.interpreter import keep_language_patched
from tests.model.rows import row_with

GPU = torch.device("cuda", 0)
ROOT = Path(__file__).parents[3]
warm_up = loading.warm_up_steps
GREEDY = row_with()
SETTINGS = read_settings(
    {
        "max_num_seqs": "3",
        "cuda_graph_sizes": "1,2",
        "max_num_batched_tokens": "20",
        "max_model_len": "96",
        "block_size": "16",
        "kv_cache_dtype": "int8",  # tests/end_to_end/test_simulated_gpu.py has the network's own
        "kv_cache_memory": str(24 * 4096),
        "speculative_config": '{"method": "ngram", "num_speculative_tokens": 1}',
    }
).of_engine()
NUM_BLOCKS = 24
WHOLE_FILES = tuple(
    f"model/{name}.py"
    for name in ("cuda_graphs", "fused_executor", "fused_sampler", "graphs", "host_copy", "mixed_graphs", "staging")
)
"""Of these, all has to run; of others, the functions that name CUDA."""
OTHERWISE = {
    "return self._run_size(size)": "a CPU captures nothing",
    "self._sampled = tokens": "without graphs",
    "return None": "without graphs",
    "return ()": "without graphs",
    "return Samples(tokens)": "draws from unchanged logits, of more rows than graphs hold",
    "return self.graphs.graph(rows)": "benchmarks.gpu",
    "captured = self._captured.get(self.size(count))": "benchmarks.gpu",
    "return None if captured is None else captured.graph": "benchmarks.gpu",
    "return super().fetch(tensors)": "a CPU",
    "return torch.mm(hidden, columns, out=out)": "float32",
    "return torch.mm(x, columns, out=out)": "float32",
    "names = [cache_choice(own, offered[0]) for own in offered]": "a CPU has two types of cache",
    "table = embedding_in_file(checkpoint, operations, dtype, device, shard)": "a CPU",
    "formats.pop(EMBEDDING, None)": "a CPU",
    'return torch.device("cpu")': "a CPU",
    "return Samples(self._kernels.sampled[:rows])": "draws from unchanged logits, of more rows than graphs hold",
    "torch.cuda.set_device(device)  # where Triton launches": "several GPUs",
    "draws = ranks.shard.rank == 0": "several ranks",
    "logits = model.logits(hidden)": "several ranks",
    "return logits if draws else None": "several ranks",
    "return gather": "several ranks",
    "gathered = gather(hidden)": "several ranks",
    "if gathered is None:": "several ranks",
    "return": "several ranks",
    "if logits is not None:": "several ranks",
    "logits.copy_(gathered)": "several ranks",
    "kernels.sample_logits(gathered, inputs.draw, inputs.live)": "several ranks",
    "return NativeExecutor(kernels) if isinstance(kernels, NativeKernels) else TorchExecutor(kernels)": "a CPU",
}
"""Statements that tests on a CPU run, and when."""


@dataclass
class Started:
    """An engine's model on the GPU, what its start printed, and what of the project's code has run."""

    gpu: FakeDevice
    loaded: loading.LoadedModel
    lines: list[str]
    executed: dict[Path, set[int]]
    replays: int = 0
    guesses: int = 0
    tokens: list[list[int]] = field(default_factory=list)
    reports: list[Reports] = field(default_factory=list)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def started(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """Starts as the engine process does, and answers requests of all kinds; the first step is profiled."""
    keep_language_patched()
    launch._device_facts.cache_clear()  # of the simulated GPU of another test
    with fake_cuda() as gpu:
        with executed_lines(gpu_files()) as executed:
            lines: list[str] = []
            # The whole warm-up runs in the engine process of tests/end_to_end/test_simulated_gpu.py.
            with mock.patch.object(loading, "warm_up_steps", lambda *args, **named: islice(warm_up(*args, **named), 1)):
                loaded = loading.load_model(SETTINGS, folder, lines.append)
            lines.append(loaded.executor.name)
            speculation = Speculation(lambda own: LastAgain())
            harness = harness_of(
                on_cpu(folder)[0], loaded.runner, overlap=loaded.executor.overlaps, speculation=speculation
            )
            harness._run = ProfiledRunner(harness._run, loaded.runner, 1, tmp_path_factory.mktemp("profile"))
            tokens, reports = run_requests(harness)
            write_logits_of_many_rows(loaded.executor)
            replays = loaded.runner.graph_replays
        yield Started(gpu, loaded, lines, executed, replays, harness.stats.draft_tokens, tokens, reports)


def write_logits_of_many_rows(executor: Executor) -> None:
    """What a step of more than SMALL_STEP rows does, into a buffer of its own."""
    assert isinstance(executor, FusedExecutor)
    hidden, out = torch.ones(2, 64, dtype=torch.float16, device=GPU), torch.empty(2, VOCAB_SIZE, device=GPU)
    executor.kernels.logits(hidden, executor.model.head, out=out)


def apart(value: object) -> tuple[list[object], list[float]]:
    """What nested lists, tuples and dictionaries hold: ids and names, and floats."""
    if isinstance(value, float):
        return [], [value]
    if isinstance(value, dict):
        return apart([part for item in value.items() for part in item])
    if not isinstance(value, list | tuple):
        return [value], []
    parts = [apart(item) for item in value]
    # Lengths tell one nesting from another.
    return [len(parts), *(item for others, _ in parts for item in others)], [each for _, own in parts for each in own]


def gpu_files() -> list[Path]:
    found = [path for part in ("kernels", "model", "server/engine") for path in (ROOT / part).rglob("*.py")]
    return sorted(path for path in found if gpu_statements(path) or str(path.relative_to(ROOT)) in WHOLE_FILES)


def on_cpu(folder: Path, sizes: tuple[int, ...] = ()) -> tuple[Persimmon, Runner]:
    """The same kernels on a CPU."""
    config, kernels = PersimmonConfig.from_folder(folder), FusedKernels(CPU)
    model = Persimmon(config, Checkpoint.open(folder, config).tensors(), torch.float16, CPU, kernels)
    executor = FusedExecutor(kernels, sizes)
    executor.reserve(limits_of(SETTINGS, config, 96))
    return model, Runner(executor.start(model, poisoned_cache(model, NUM_BLOCKS, SETTINGS.block_size, torch.int8)))


class LastAgain:
    """Guesses that the last token comes again."""

    def propose(self, token_ids: Ids[int], count: int) -> Proposal:
        return Proposal(token_ids[-1:], 1)


def harness_of(model: Persimmon, runner: Runner, *, overlap: bool, speculation: Speculation | None = None) -> Harness:
    return Harness(
        model,
        num_blocks=NUM_BLOCKS,
        block_size=SETTINGS.block_size,
        max_num_seqs=SETTINGS.max_num_seqs,
        max_num_batched_tokens=SETTINGS.max_num_batched_tokens,
        prefix_caching=True,
        overlap=overlap,
        runner=runner,
        speculation=speculation,
    )


def requests() -> list[Sequence]:
    """Prompts in several chunks and in one, forks whose last block is copied, every kind of draw and report."""

    keys = count()

    def sequence(prompt: int, sampling: SamplingParams, max_tokens: int = 2, **more: Any) -> Sequence:
        token_ids = [7 + 3 * place for place in range(prompt)]
        return Sequence(next(keys), token_ids, max_tokens, sampling=sampling, **more)

    greedy = SamplingParams(temperature=0.0)
    drawn = SamplingParams(temperature=1.0, seed=5, top_p=0.9, logprobs=2)
    changed = SamplingParams(temperature=1.0, seed=6, repetition_penalty=1.3, logit_bias={3: 2.0})
    forks = [sequence(5, drawn, sample_index=index) for index in (1, 2)]
    return [
        sequence(20, greedy),
        sequence(5, drawn, forks=forks),
        *forks,
        sequence(18, changed, max_tokens=4, prompt_logprobs=1),
        sequence(6, greedy, max_tokens=0, pooling="sum"),
    ]


def run_requests(harness: Harness) -> tuple[list[list[int]], list[Reports]]:
    sequences = requests()
    harness.run([own for own in sequences if own.leader is None])
    return [new_tokens(own) for own in sequences], [harness.reports[own] for own in sequences]


class TestTheStart:
    def test_captures_graphs_and_names_the_gpu(self, started: Started) -> None:
        assert "cuda:0 (NVIDIA H200)" in started.lines
        assert any(line.lstrip().startswith("CUDA graphs") for line in started.lines)

    def test_shows_what_each_type_of_cache_takes_and_holds(self, started: Started) -> None:
        [choices] = [line for line in started.lines if "--kv-cache-dtype" in line]
        assert [choice.split()[0] for choice in choices.partition(": ")[2].split("), ")] == ["int8", "auto", "fp8_e4m3"]
        assert f"int8 holds {started.loaded.plan.kv_tokens} (" in choices

    def test_plans_with_a_share_of_the_gpu_s_memory(self, started: Started) -> None:
        assert started.loaded.plan.available == int(H200_BYTES * SETTINGS.gpu_memory_utilization)
        with fake_cuda(total_memory=GPU_RESERVE * 2):
            held = torch.empty(GPU_RESERVE // 4, dtype=torch.uint8, device=GPU)
            assert available_memory(GPU, 0.9).bytes == GPU_RESERVE - held.nbytes

    def test_takes_no_more_of_it_than_planned(self, started: Started) -> None:
        plan = started.loaded.plan
        assert started.gpu.allocated <= plan.weights + plan.step_buffers + plan.kv_cache + (1 << 20)


def test_requests_get_what_they_get_on_a_cpu(started: Started, folder: Path) -> None:
    model, runner = on_cpu(folder)
    # A GPU adds in another order.
    with mock.patch.object(logprobs, "log_totals", logprobs.log_totals_by_halves):
        expected = run_requests(harness_of(model, runner, overlap=False))
    tokens, reports = expected
    assert started.tokens == tokens
    # torch's float16 products of another number of rows may round otherwise on a CPU with instructions for float16.
    ids, numbers = apart([asdict(report) for report in started.reports])
    expected_ids, expected_numbers = apart([asdict(report) for report in reports])
    assert ids == expected_ids
    assert numbers == pytest.approx(expected_numbers, rel=1e-2, abs=2e-2)
    assert started.replays > 0
    assert started.guesses > 0


def test_all_that_only_a_gpu_runs_has_run(started: Started) -> None:
    left = []
    for path in gpu_files():
        name = str(path.relative_to(ROOT))
        for lines, text in gpu_statements(path, whole=name in WHOLE_FILES).items():
            if not started.executed[path.resolve()].intersection(lines) and text not in OTHERWISE:
                left.append(f"{name}:{lines.start}: {text}")
    assert left == []


class TestSteps:
    def batches(self) -> dict[str, list[SequenceInput]]:
        """By name, some that the warm-up has compiled and sequences' first blocks hold."""
        seen = TokenCounts([4, 5])
        changed = row_with(temperature=2.0, seed=5, top_k=3, seen=seen, presence_penalty=1.0, logit_bias={3: 1.0})
        return {
            "decode": [SequenceInput([5], 0, [1], (GREEDY,)), SequenceInput([6], 0, [2], (row_with(temperature=1.0),))],
            "decode of changed logits": [SequenceInput([5], 0, [1], (changed,))],
            "log-probabilities": [SequenceInput([5], 0, [1], (row_with(logprobs=2),))],
            "guesses": [SequenceInput([5, 6], 0, [1], (GREEDY, changed), guesses=1)],
            "mixed": [SequenceInput([3, 4, 5], 0, [3], (GREEDY,)), SequenceInput([5], 0, [1], (GREEDY,))],
            "forks": [SequenceInput([3, 4], 0, [3], (GREEDY, row_with(temperature=1.0, sample_index=1)))],
            "pooled": [SequenceInput([3, 4], 0, [3], (), PooledStates(range(2), total=True))],
            "prompt's log-probabilities": [SequenceInput([3, 4], 0, [3], (GREEDY,), PromptLogprobs(0, [4], 1))],
            "large": [SequenceInput([3] * (SMALL_STEP + 1), 0, [3, 4, 5, 6, 7], (GREEDY,))],
        }

    def test_are_launched_without_waiting_and_give_what_they_give_on_a_cpu(
        self, started: Started, folder: Path
    ) -> None:
        _, runner = on_cpu(folder, sizes=(1, 3))
        for name, batch in self.batches().items():
            torch.cuda.synchronize()
            started.gpu.waits.clear()
            pending = started.loaded.runner.launch(batch)
            assert (name, started.gpu.waits) == (name, [])
            assert pending.wait() == runner.launch(batch).wait()

    def test_that_report_nothing_are_waited_for_too(self, started: Started) -> None:
        """The scheduler learns from the wait what a chunk of a prompt takes."""
        pending = started.loaded.runner.launch([SequenceInput([3, 4, 5], 0, [3], ())])
        started.gpu.waits.clear()
        assert pending.wait().tokens == []
        assert started.gpu.waits == ["event"]

    def test_may_run_behind_each_other_before_any_is_waited_for(self, started: Started) -> None:
        runner = started.loaded.runner
        first = [SequenceInput([5, 6], 0, [1], (GREEDY,))]
        alone = runner.run(first)
        for position in (2, 3, 4):
            alone += runner.run([SequenceInput(alone[-1:], position, [1], (GREEDY,))])
        pending = [runner.launch(first)]
        pending += [runner.launch([SequenceInput([-1], position, [1], (GREEDY,))]) for position in (2, 3, 4)]
        assert [token for step in pending for (token,) in step.wait().tokens] == alone


def test_uploads_do_not_wait(started: Started) -> None:
    torch.cuda.synchronize()
    started.gpu.waits.clear()
    uploaded = launch.upload(np.arange(3), GPU)
    assert started.gpu.waits == []
    assert uploaded.tolist() == [0, 1, 2]
