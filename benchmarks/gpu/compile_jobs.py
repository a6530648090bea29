"""What the suite launches, section by section, as calls on tensors without memory: for the processes that compile it.

A kernel that is not here is compiled when it is launched.  Where launches are not replaced by compilations, running a
job fails.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol
from unittest import mock

import torch

from benchmarks.gpu.inputs import widths
from benchmarks.gpu.model import GREEDY, Machine, skipping
from benchmarks.gpu.step_parts import AHEAD_BYTES
from benchmarks.gpu.suite import SUITES, Setting
from benchmarks.gpu.sweep import ProjectionSweep, projection_sweeps
from persimmon.kernels import decode_attention
from persimmon.kernels.fused import FusedKernels
from persimmon.kernels.invariant import InvariantKernels
from persimmon.kernels.launch import max_shared_bytes
from persimmon.kernels.layer_norm import statistics_shape
from persimmon.kernels.projection import project, project_add_
from persimmon.kernels.projection_config import Norm, ProjectionConfig, Workspace
from persimmon.model.fused_executor import FusedExecutor
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import Runner, SequenceInput
from persimmon.model.sampling_params import SamplingParams
from persimmon.model.token_counts import TokenCounts

META = torch.device("meta")

TRUNCATED = RowSampling(asked=SamplingParams(temperature=0.8, top_p=0.9, top_k=50, seed=1))
ADJUSTED = RowSampling(asked=SamplingParams(presence_penalty=0.5, logprobs=2), seen=TokenCounts([1, 2]))


class CompileJob(Protocol):
    """Launches that are compiled together, by one process."""

    def run(self, shape: str) -> None:
        """Makes the launches, for a suite by its name."""


@dataclass(frozen=True, slots=True)
class StepJob:
    """The kernels of one kind of step of the network.

    Attributes:
        decodes: sequences with one token.
        chunk: tokens of a prompt next to them; with 0 it is a step that a graph would hold.
        dtype: of the network.
        block_size: tokens of a block, if not the suite's.
        pdl: whether launches are dependent.
        reads_zeros: whether weights that meet only zeros are read as well.
        ahead_bytes: of the next weight that decode attention brings into the L2 cache.
        samplings: how rows are drawn, in turn.
        kernels_type: the operations.
    """

    decodes: int = 0
    chunk: int = 0
    dtype: torch.dtype = torch.float16
    block_size: int | None = None
    pdl: bool = False
    reads_zeros: bool = False
    ahead_bytes: int = decode_attention.AHEAD_BYTES
    samplings: tuple[RowSampling, ...] = (GREEDY,)
    kernels_type: type[FusedKernels] = FusedKernels

    def run(self, shape: str) -> None:
        """Runs one step of one layer."""
        with mock.patch.object(decode_attention, "AHEAD_BYTES", self.ahead_bytes):
            self._run(shape)

    def _run(self, shape: str) -> None:
        setting = Setting(SUITES[shape], META, 0)
        machine = Machine.build(
            setting,
            self.dtype,
            num_blocks=64,
            layers=1,
            block_size=self.block_size,
            kernels_type=self.kernels_type,
        )
        machine.kernels.pdl = self.pdl
        decodes = [
            SequenceInput(
                token_ids=[0], start=0, block_table=[0], samplings=[self.samplings[row % len(self.samplings)]]
            )
            for row in range(self.decodes)
        ]
        most = 0 if self.reads_zeros else machine.kernels.sparse_step
        with skipping(machine.kernels, most), torch.inference_mode():
            if not self.chunk:
                machine.graphs([self.decodes]).launch(decodes)
                return
            table = range(-(-self.chunk // machine.cache.block_size))
            prompt = SequenceInput(
                token_ids=[0] * self.chunk, start=0, block_table=table, samplings=[self.samplings[0]]
            )
            Runner(_MetaExecutor(machine.kernels).start(machine.model, machine.cache)).launch([*decodes, prompt])


class _MetaExecutor(FusedExecutor):
    """Has nothing to fetch."""

    def fetch(self, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], None]:
        """Zeros."""
        return [torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in tensors], None


@dataclass(frozen=True, slots=True)
class ProjectionJob:
    """A projection with one of the settings of the sweep."""

    sweep: ProjectionSweep
    config: ProjectionConfig

    def run(self, shape: str) -> None:
        """Launches it once."""
        width = next(width for width in widths(SUITES[shape].config) if width.name == self.sweep.name)
        rows, into, out_of = self.sweep.rows, width.in_features, width.out_features

        def empty(*sizes: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
            return torch.empty(sizes, dtype=dtype, device=META)

        workspace = Workspace.allocate([(out_of, self.config)], rows, META)
        live, bias = empty(1, dtype=torch.int32), empty(out_of)
        if self.sweep.name in ("query_key_value", "mlp_up"):
            norm = Norm(
                statistics=empty(*statistics_shape(rows, into), dtype=torch.float32),
                weight=empty(into, dtype=torch.float32),
                bias=empty(into, dtype=torch.float32),
                eps=1e-5,
            )
            project(
                empty(rows, into),
                empty(out_of, into),
                bias,
                norm=norm,
                live=live,
                workspace=workspace,
                config=self.config,
                activation="relu_squared" if self.sweep.name == "mlp_up" else "none",
            )
            return
        columns = self.sweep.name == "mlp_down"
        project_add_(
            empty(rows, out_of),
            empty(rows, into),
            empty(into, out_of) if columns else empty(out_of, into),
            bias,
            transposed=columns,
            alive=empty(into, dtype=torch.int8) if self.sweep.skipping else None,
            live=live,
            workspace=workspace,
            config=self.config,
        )


def jobs_of(shape: str, section: str) -> Sequence[CompileJob]:
    """What a section launches in addition to the sections before it; empty where that is little."""
    suite = SUITES[shape]
    buckets = sorted({min(suite.check_batch, rows) for rows in (1, 17, 33)})
    if section == "smoke":
        plain = [StepJob(rows) for rows in reversed(buckets)]
        prompts = [StepJob(chunk=suite.smoke_prompt), StepJob(min(suite.check_batch, 8), reads_zeros=True)]
        return [*plain, *prompts, *(replace(job, pdl=True) for job in plain)]
    if section == "steps":
        draws = [StepJob(rows, samplings=(TRUNCATED,)) for rows in buckets]
        large = StepJob(max(batch for batch, _ in suite.step_grid))
        ahead = [StepJob(1, ahead_bytes=size) for size in AHEAD_BYTES]
        return [*draws, large, *ahead, StepJob(chunk=min(suite.chunk, suite.prompts[0]))]
    if section == "engine":
        mixed = (GREEDY, TRUNCATED, ADJUSTED)
        jobs = [StepJob(3, chunk, samplings=mixed) for chunk in (5, 20, 40, 100)]
        jobs += [StepJob(rows, samplings=(ADJUSTED, TRUNCATED)) for rows in buckets]
        return [
            replace(job, block_size=suite.engine_block_size, kernels_type=kernels)
            for kernels in (FusedKernels, InvariantKernels)
            for job in jobs
        ]
    if section == "checks":
        return [StepJob(suite.check_batch, block_size=size) for size in suite.check_block_sizes]
    if section == "types":
        types = suite.other_dtypes
        return [StepJob(rows, dtype=dtype) for dtype in types for rows in buckets] + [
            StepJob(chunk=20, dtype=dtype) for dtype in types
        ]
    if section == "sweep":
        return [
            ProjectionJob(sweep, config)
            for sweep in projection_sweeps(suite, max_shared_bytes(META))
            for config in sweep.configs
        ]
    return []
