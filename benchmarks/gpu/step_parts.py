"""What a step takes beyond its network: draws, and the gaps between consecutive steps; and what skipping saves."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from unittest import mock

import torch

from benchmarks.gpu import targets
from benchmarks.gpu.model import GREEDY, plant_zeros, skipping
from benchmarks.gpu.step_bench import DTYPE, StepBench
from benchmarks.gpu.timing import Call, time_variants
from persimmon.kernels import decode_attention
from persimmon.model.cuda_graphs import DecodeGraphs
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import PendingStep, Runner, SequenceInput
from persimmon.model.sampling_params import SamplingParams
from persimmon.model.step_inputs import StepBuffer, StepInputs, write_draw

AHEAD_BYTES = (0, 8 << 20, 16 << 20, 32 << 20)
"""Bytes of the next weight; the first turns it off."""

DRAWS = {
    "greedy": GREEDY,
    "temperature": RowSampling(asked=SamplingParams(temperature=0.8, seed=1)),
    "top-p, top-k": RowSampling(asked=SamplingParams(temperature=0.8, top_p=0.9, top_k=50, seed=1)),
}


def sampling(bench: StepBench) -> None:
    """What drawing takes in addition to the output projection, and the steps that do it."""
    suite, device = bench.setting.suite, bench.setting.device
    model, kernels = bench.machine.model, bench.machine.kernels
    for batch, context in suite.step_grid[:2]:
        if not bench.fits(batch, context):
            continue
        hidden = torch.randn(batch, suite.config.hidden_size, device=device).to(DTYPE)
        logits = torch.zeros(batch, suite.config.vocab_size, device=device)
        variants: dict[str, list[Call]] = {"projection alone": [partial(torch.mm, hidden, model.head.rows.t())]}
        for name, params in DRAWS.items():
            inputs = _draw_inputs(bench, _rows(params, batch))
            variants[name] = [partial(kernels.sample, hidden, model.head, inputs.draw, inputs.live, logits)]
            if params.asked.truncates:
                truncated = partial(kernels.sample_truncated, logits, inputs.draw, inputs.truncation, inputs.live)
                variants[name] = [partial(_both, variants[name][0], truncated)]
        timed = time_variants(variants, device, suite.seconds_per_figure)
        for name, params in DRAWS.items():
            step = [
                replace(item, samplings=[own])
                for item, own in zip(bench.batch(batch, context), _rows(params, batch), strict=True)
            ]
            launch = bench.times(bench.graphs[False], step).launch
            share = (timed[name].median - timed["projection alone"].median) / launch.median
            bench.report.row(
                "sampling",
                what=name,
                batch=batch,
                context=context,
                step_ms=launch.median / 1e3,
                us=timed[name].median,
                projection_alone_us=timed["projection alone"].median,
                share_of_step=share,
            )
            if (batch, context) == (64, 512) and name == "temperature":
                bench.report.figure(targets.SAMPLING, share)


def _rows(params: RowSampling, count: int) -> list[RowSampling]:
    return [replace(params, asked=replace(params.asked, seed=row)) for row in range(count)]


def _draw_inputs(bench: StepBench, params: Sequence[RowSampling]) -> StepInputs:
    rows = len(params)
    host, on_device = (StepBuffer(rows, 0, device) for device in (torch.device("cpu"), bench.setting.device))
    write_draw(host.inputs(rows), params)
    on_device.words.copy_(host.words)
    return on_device.inputs(rows)


def _both(first: Call, second: Call) -> None:
    first()
    second()


def chains(bench: StepBench, batch: int) -> None:
    """Steps that feed each other on the device, and steps that wait for the tokens of the one before."""
    suite, graphs = bench.setting.suite, bench.graphs[False]
    context = min(512, max(context for _, context in suite.step_grid))
    if not bench.fits(batch, context):
        return
    plant_zeros(bench.machine.model, 0.0)
    runner, step = bench.machine.runner(graphs), bench.batch(batch, context)
    alone = bench.times(graphs, step).replay.median / 1e3
    taken = [[_chain(bench, runner, step, waits=waits) for waits in (False, True)] for _ in range(suite.chain_rounds)]
    fed, fetched = (statistics.median(times) for times in zip(*taken, strict=True))
    bench.report.row(
        "consecutive steps",
        batch=batch,
        context=context,
        replay_ms=alone,
        fed_ms=fed,
        fed_idle_us=1e3 * (fed - alone),
        fetched_ms=fetched,
        fetched_idle_us=1e3 * (fetched - alone),
    )
    if batch == 64:
        bench.report.figure(targets.IDLE, max(0.0, fed - alone) / fed, f"{1e3 * (fed - alone):.0f} us of {fed:.2f} ms")


def _chain(bench: StepBench, runner: Runner, step: Sequence[SequenceInput], *, waits: bool) -> float:
    """Milliseconds of each of some consecutive steps."""
    fed: Sequence[int] = [item.token_ids[0] for item in step]
    before: PendingStep | None = None
    bench.synchronize()
    began = time.perf_counter()
    steps = bench.setting.suite.chain_steps
    for number in range(steps):
        moved = [
            SequenceInput(
                token_ids=[token], start=item.start + number, block_table=item.block_table, samplings=item.samplings
            )
            for token, item in zip(fed, step, strict=True)
        ]
        launched = runner.launch(moved)
        if waits:
            fed = [token for (token,) in launched.wait().tokens]
            continue
        # As the engine does: one step's tokens are read while the next one runs.
        if before is not None:
            before.wait()
        before, fed = launched, [-1 - row for row in range(len(step))]
    bench.synchronize()
    return (time.perf_counter() - began) / steps * 1e3


def weights_ahead(bench: StepBench) -> None:
    """Steps whose idle attention programs bring less, as much and more of the next weight into the L2 cache."""
    batch, context = bench.setting.suite.step_grid[0]
    plant_zeros(bench.machine.model, 0.0)
    step = bench.batch(batch, context)
    for size in AHEAD_BYTES if bench.setting.on_gpu else AHEAD_BYTES[:1]:
        with mock.patch.object(decode_attention, "AHEAD_BYTES", size):
            times = bench.times(bench.machine.graphs([batch]), step)
        usual = size == decode_attention.AHEAD_BYTES
        bench.report.row(
            "weights ahead",
            batch=batch,
            context=context,
            mib=size >> 20,
            usual=usual,
            replay_ms=times.replay.median / 1e3,
        )


def skipped(bench: StepBench) -> None:
    """Steps that read, and steps that do not read, what meets only zeros: places of each token's own, or shared."""
    suite, machine = bench.setting.suite, bench.machine
    captured: list[DecodeGraphs] = []
    for most_tokens in (max(suite.sparse_batches), 0):
        with skipping(machine.kernels, most_tokens):
            captured.append(machine.graphs(suite.sparse_batches))
    for shared in (False, True):
        plant_zeros(machine.model, max(suite.zero_fractions), shared=shared)
        for batch in suite.sparse_batches:
            step = bench.batch(batch, suite.sparse_context)
            seen = bench.seen(step)
            sparse, dense = (bench.times(graphs, step).launch for graphs in captured)
            bench.report.row(
                "skipping",
                batch=batch,
                context=suite.sparse_context,
                places="shared" if shared else "own",
                zeros=seen.zeros,
                unread_rows=seen.unread,
                ms=sparse.median / 1e3,
                dense_ms=dense.median / 1e3,
                gain=dense.median / sparse.median,
            )
