"""Checks whole decode steps: a network with few layers against float32, and against itself bit for bit.

Alone and in a batch, captured and eager, padded and not, replayed, with and without skipping, fed by the step before.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.checks_attention import check_lengths
from benchmarks.gpu.compare import check_repeats, check_same
from benchmarks.gpu.model import Machine, decode_batch, plant_zeros, random_model, seen_zeros, skipping
from benchmarks.gpu.report import Report
from benchmarks.gpu.suite import Setting
from persimmon.kernels import Kernels, LayerCache, reference
from persimmon.model.cuda_graphs import DecodeGraphs
from persimmon.model.kv_cache import KVCache
from persimmon.model.persimmon import Persimmon, Step
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import SequenceInput
from persimmon.model.sampling_params import SamplingParams

STEP_ERROR = {torch.float16: 1e-2, torch.bfloat16: 8e-2, torch.float32: 1e-4}
"""Norm of a step's error over that of its result: each layer rounds a dozen times."""


class StepCheck:
    """A network, a filled cache and a batch of mixed lengths, and what must hold for its steps.

    Args:
        setting: the suite, whose lengths and number of layers these are.
        report: gets the outcomes.
        dtype: of the network.
    """

    def __init__(self, setting: Setting, report: Report, dtype: torch.dtype) -> None:
        suite = setting.suite
        self._setting, self._report, self._dtype = setting, report, dtype
        self._title = f"decode step, {str(dtype).removeprefix('torch.')}"
        lengths = check_lengths(setting)
        chain = suite.smoke_chain
        blocks = sum(-(-(length + chain) // suite.block_size) for length in lengths)
        # The grid of predicted steps uses the same cache.
        blocks = max(blocks, *(batch * -(-context // suite.block_size) for batch, context in suite.smoke_grid))
        self.machine = Machine.build(setting, dtype, num_blocks=blocks, layers=suite.smoke_layers)
        plant_zeros(self.machine.model, 0.9)
        tables = self.machine.tables([length + chain for length in lengths])
        dice = random.Random(setting.seed)
        self._batch = decode_batch(lengths, tables, [dice.randrange(suite.config.vocab_size) for _ in lengths])
        self._before = _copy_of(self.machine.cache)
        self._graphs: dict[bool, DecodeGraphs] = {}
        self._expected: torch.Tensor | None = None

    @property
    def expected(self) -> torch.Tensor:
        """[R, hidden], the final states of the eager step, which all others are compared with."""
        if self._expected is None:
            self._restore()
            self._expected = self._hidden(self._batch)
        return self._expected

    def near_float32(self) -> None:
        """The eager step against plain torch and float32, from the same weights and cache."""
        with seen_zeros() as seen:
            self._restore()
            hidden = self._hidden(self._batch)
        model = random_model(self._setting, self.machine.model.config, torch.float32, reference, stored=self._dtype)
        plant_zeros(model, 0.9)
        cache = KVCache([LayerCache(layer.keys.float(), layer.values.float()) for layer in self._before.layers])
        exact = _forward(model, cache, reference, self._batch).double()
        relative = ((hidden.double() - exact).norm() / exact.norm()).item()
        self._report.check(
            f"{self._title}: near float32",
            relative <= STEP_ERROR[self._dtype],
            relative_error=relative,
            zero_activations=seen.zeros,
        )

    def captured(self, *, pdl: bool = False) -> None:
        """Captured steps on padded buffers against eager and plain ones, tokens and cache."""
        hot = self._hot()
        graphs = self.graphs(pdl)
        for size in sorted({max(1, size - 1) for size in self._sizes()}):
            outcomes = []
            for steps in (graphs, None):
                self._restore()
                drawn = torch.tensor(self.machine.runner(steps).run(hot[:size]))
                outcomes.append([drawn, *(tensor.clone() for tensor in self.machine.cache.tensors)])
            check_same(self._report, f"{self._name(pdl)}: {size} captured and padded = eager", *outcomes)

    def replays(self, *, pdl: bool = False) -> None:
        """Many replays of one step: the same tokens and states every time, and counters at zero after them."""
        graphs, cache = self.graphs(pdl), self.machine.cache

        def call() -> Sequence[torch.Tensor]:
            tokens, rows = graphs.launch(self._batch).tokens, len(self._batch)
            return [tokens, self.machine.logprobs(rows), cache.layers[-1].keys, cache.layers[-1].values]

        self._restore()
        name = f"{self._name(pdl)}: the same bits every time"
        check_repeats(self._report, name, call, self._setting.suite.smoke_replays)
        left = sum(int(counter.count_nonzero()) for counter in self.machine.counters())
        self._report.check(f"{self._name(pdl)}: counters are back at zero", left == 0, not_zero=left)

    def alone(self) -> None:
        """The last rows of the batch in smaller ones."""
        most = len(self._batch)
        for size in sorted({1, min(16, most), min(17, most)}):
            own = self._hidden(self._batch[-size:])
            check_same(
                self._report, f"{self._title}: rows in a batch of {size} = of {most}", [own], [self.expected[-size:]]
            )

    def skips(self) -> None:
        """Steps that do not read what meets only zeros against those that do; the cache holds the same after all."""
        small = self._batch[: min(8, len(self._batch))]
        with skipping(self.machine.kernels, 0):
            dense = self._hidden(small)
        check_same(self._report, f"{self._title}: skipping = dense", [self._hidden(small)], [dense])

    def chains(self, *, pdl: bool = False) -> None:
        """Steps fed by placeholders on the device against steps fed by tokens that the host has fetched."""
        chains = []
        for waits in (False, True):
            self._restore()
            chains.append(self._chain(self.graphs(pdl), waits=waits))
        check_same(self._report, f"{self._name(pdl)}: placeholders = fetched tokens", [chains[0]], [chains[1]])

    def dependent(self) -> None:
        """The same with programmatic dependent launch."""
        # Measurements plant other zeros between these checks.
        plant_zeros(self.machine.model, 0.9)
        plain = self.expected
        self.machine.kernels.pdl = True
        try:
            self._restore()
            own = self._hidden(self._batch)
            check_same(self._report, f"{self._name(True)}: eager = plain", [own], [plain])
            self.captured(pdl=True)
            self.replays(pdl=True)
            self.chains(pdl=True)
        finally:
            self.machine.kernels.pdl = False

    def graphs(self, pdl: bool = False) -> DecodeGraphs:
        """Steps of a few sizes; captured once."""
        if pdl not in self._graphs:
            usual, self.machine.kernels.pdl = self.machine.kernels.pdl, pdl
            self._graphs[pdl] = self.machine.graphs(self._sizes())
            self.machine.kernels.pdl = usual
        return self._graphs[pdl]

    def _sizes(self) -> list[int]:
        grid = (batch for batch, _ in self._setting.suite.smoke_grid)
        return sorted({1, min(4, len(self._batch)), len(self._batch), *grid})

    def _name(self, pdl: bool) -> str:
        return f"{self._title}{', dependent launch' if pdl else ''}"

    def _hot(self) -> list[SequenceInput]:
        return [
            replace(item, samplings=(RowSampling(asked=SamplingParams(temperature=0.8, seed=row)),))
            for row, item in enumerate(self._batch)
        ]

    def _hidden(self, batch: Sequence[SequenceInput]) -> torch.Tensor:
        """The final hidden states of a decode step, run eagerly."""
        machine = self.machine
        return _forward(machine.model, machine.cache, machine.kernels, batch, machine.kernels.sampled)

    def _restore(self) -> None:
        for tensor, own in zip(self.machine.cache.tensors, self._before.tensors, strict=True):
            tensor.copy_(own)

    def _chain(self, graphs: DecodeGraphs, *, waits: bool) -> torch.Tensor:
        """[steps, R] tokens of steps that are fed by the one before: on the device, or through the host."""
        runner, batch = self.machine.runner(graphs), self._hot()
        pending = []
        fed: Sequence[int] = [item.token_ids[0] for item in batch]
        for step in range(self._setting.suite.smoke_chain):
            moved = [
                SequenceInput(
                    token_ids=[token],
                    start=item.start + step,
                    block_table=item.block_table,
                    samplings=[replace(own, position=step) for own in item.samplings],
                )
                for token, item in zip(fed, batch, strict=True)
            ]
            pending.append(runner.launch(moved))
            fed = (
                [token for (token,) in pending[-1].wait().tokens] if waits else [-1 - row for row in range(len(batch))]
            )
        return torch.tensor([[token for (token,) in step.wait().tokens] for step in pending])


def attempt_checks(check: StepCheck, report: Report, *, seconds: float = 2.0) -> None:
    """All checks of a step but those of dependent launch, each an attempt of its own."""
    checks: dict[str, Callable[[], None]] = {
        "near float32": check.near_float32,
        "captured = eager": check.captured,
        "replays": check.replays,
        "a row alone": check.alone,
        "skipping = dense": check.skips,
        "placeholders": check.chains,
    }
    for what, call in checks.items():
        report.attempt(what, call, seconds=seconds)


def _forward(
    model: Persimmon,
    cache: KVCache,
    kernels: Kernels[Any, Any],
    batch: Sequence[SequenceInput],
    sampled: torch.Tensor | None = None,
) -> torch.Tensor:
    plan = kernels.plan_attention(
        [item.block_table for item in batch],
        [item.start for item in batch],
        [1] * len(batch),
        num_blocks=cache.num_blocks,
        num_heads=cache.num_heads,
        block_size=cache.block_size,
        dtype=cache.dtype,
        device=cache.device,
    )
    tokens = torch.tensor([item.token_ids[0] for item in batch], device=cache.device)
    return model.forward(Step(token_ids=tokens, attention=plan, logits_rows=None, sampled=sampled), cache)


def _copy_of(cache: KVCache) -> KVCache:
    return KVCache([LayerCache(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])
