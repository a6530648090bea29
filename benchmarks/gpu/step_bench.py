"""The whole network with a filled cache and captured steps, and how a step is timed."""

import gc
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.gpu.model import Machine, SeenZeros, decode_batch, seen_zeros
from benchmarks.gpu.report import Report
from benchmarks.gpu.suite import Setting
from benchmarks.gpu.timing import Timing, time_loop
from persimmon.model.checkpoint import expected_shapes
from persimmon.model.cuda_graphs import DecodeGraphs
from persimmon.model.kv_cache import block_bytes
from persimmon.model.runner import SequenceInput

DTYPE = torch.float16
KEPT_FREE = 6 << 30
"""Bytes for buffers, graphs and prompts' activations."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """A captured step by itself, and launched repeatedly with all that the host does for it."""

    replay: Timing
    launch: Timing


class StepBench:
    """A network with as large a cache as the grid of steps can use and memory allows.

    Args:
        setting: the suite.
        report: gets how long the start takes.

    Attributes:
        machine: what runs steps.
        graphs: captured steps, by whether launches are dependent.
    """

    def __init__(self, setting: Setting, report: Report) -> None:
        suite, config = setting.suite, setting.suite.config
        self.setting, self.report = setting, report
        wanted = max(self._blocks(batch, context) for batch, context in suite.step_grid)
        if setting.on_gpu:
            free, _ = torch.cuda.mem_get_info(setting.device)
            weights = DTYPE.itemsize * sum(math.prod(shape) for shape in expected_shapes(config).values())
            wanted = min(wanted, (free - weights - KEPT_FREE) // block_bytes(config, suite.block_size, DTYPE))
        began = time.perf_counter()
        self.machine = Machine.build(setting, DTYPE, num_blocks=wanted)
        self.synchronize()
        report.row("start", what="weights, cache, buffers", seconds=time.perf_counter() - began, blocks=wanted)
        self.graphs: dict[bool, DecodeGraphs] = {}

    def capture(self, *, pdl: bool = False) -> None:
        """Graphs of all batch sizes: how long that takes, and how large they are."""
        sizes = sorted({batch for batch, _ in self.setting.suite.step_grid})
        gc.collect()
        free, began = self._free_memory(), time.perf_counter()
        self.machine.kernels.pdl = pdl
        try:
            self.graphs[pdl] = self.machine.graphs(sizes)
        finally:
            self.machine.kernels.pdl = False
        self.synchronize()
        self.report.row(
            "start",
            what=f"{len(sizes)} graphs",
            seconds=time.perf_counter() - began,
            dependent=pdl,
            memory_mb=(free - self._free_memory()) / 1e6,
        )

    def times(self, graphs: DecodeGraphs, step: Sequence[SequenceInput]) -> StepTimes:
        """Of a decode step."""
        device, seconds = self.setting.device, 4 * self.setting.suite.seconds_per_figure
        launch = time_loop(partial(graphs.launch, step), device, seconds)
        # Without a GPU no graph can be replayed, so nothing is measured.
        captured = graphs.graph(len(step))
        return StepTimes(time_loop(captured.replay, device, seconds / 2) if captured else launch, launch)

    def seen(self, step: Sequence[SequenceInput]) -> SeenZeros:
        """The zeros of a step like this one, run eagerly; large steps do not skip, and none are counted there."""
        with seen_zeros() as seen:
            self.machine.runner(None).run(step)
        return seen

    def batch(self, batch: int, context: int) -> list[SequenceInput]:
        """A step of `batch` sequences, with room for a chain of steps if the model has it."""
        room = self._room(context)
        dice = random.Random(self.setting.seed)
        tokens = [dice.randrange(self.setting.suite.config.vocab_size) for _ in range(batch)]
        return decode_batch([context] * batch, self.machine.tables([room] * batch), tokens)

    def fits(self, batch: int, context: int) -> bool:
        """Whether the cache holds a step; notes where it does not."""
        fits = self._blocks(batch, context) <= self.machine.cache.num_blocks
        if not fits:
            self.report.note(f"{batch} x {context}: a cache of {self.machine.cache.num_blocks} blocks does not hold it")
        return fits

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.setting.on_gpu:
            torch.cuda.synchronize()

    def _room(self, context: int) -> int:
        return min(context + self.setting.suite.chain_steps, self.setting.suite.max_model_len)

    def _blocks(self, batch: int, context: int) -> int:
        return batch * -(-self._room(context) // self.setting.suite.block_size)

    def _free_memory(self) -> int:
        if not self.setting.on_gpu:
            return 0
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.setting.device)[0]
