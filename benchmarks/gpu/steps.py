"""How fast are whole steps?  The network with random weights and planted zeros, as the engine runs it.

Decode steps are CUDA graphs.  A floor is the bytes that a step must read, over the copy rate of this card.
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.floors import prompt_flops, step_bytes
from benchmarks.gpu.ceilings import COPY, MATMUL
from benchmarks.gpu.model import GREEDY, Machine, SeenZeros, decode_batch, plant_zeros, seen_zeros, skipping
from benchmarks.gpu.profile import profile_launches
from benchmarks.gpu.report import Report
from benchmarks.gpu.suite import Setting
from benchmarks.gpu.timing import Call, Timing, time_loop, time_variants
from persimmon.kernels.launch import supports_pdl
from persimmon.model.checkpoint import expected_shapes
from persimmon.model.cuda_graphs import DecodeGraphs
from persimmon.model.kv_cache import block_bytes
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import PendingStep, Runner, SequenceInput
from persimmon.model.sampling_params import SamplingParams
from persimmon.model.step_inputs import StepBuffer, StepInputs, write_draw

DTYPE = torch.float16
DENSE_TOKENS, SPARSE_TOKENS = "batch 1 dense, tokens/s", "batch 1 at 90% zeros, tokens/s"
STEP_64, SAMPLING_SHARE = "step at 64 x 512, ms", "sampling, share of a step at 64 x 512"
PREFILL_SHARE = "prefill at 2k, share of the matmul rate"

DRAWS = {
    "greedy": GREEDY,
    "temperature": RowSampling(asked=SamplingParams(temperature=0.8, seed=1)),
    "top-p, top-k": RowSampling(asked=SamplingParams(temperature=0.8, top_p=0.9, top_k=50, seed=1)),
}
KEPT_FREE = 3 << 30
"""Bytes for graphs and for prompts' activations."""


def run(setting: Setting, report: Report) -> None:
    """Start, decode steps, what sampling and waiting take, prompts."""
    steps = _Steps(setting, report, _start(setting, report))
    with report.attempt("graphs"):
        steps.capture()
    for zeros in setting.suite.zero_fractions:
        with report.attempt(f"decode steps at {zeros} zeros"):
            steps.decode(zeros)
    for name, measure in {
        "prompts": steps.prompts,
        "sampling": steps.sampling,
        "consecutive steps": steps.chains,
        "skipping": steps.skipping,
        "launches": steps.launches,
    }.items():
        with report.attempt(name):
            measure()


def _start(setting: Setting, report: Report) -> Machine:
    """With as large a cache as the grid can use and memory allows."""
    suite, config = setting.suite, setting.suite.config
    wanted = max(batch * -(-(context + suite.chain_steps) // suite.block_size) for batch, context in suite.step_grid)
    longest = suite.chain_steps + max(*(context for _, context in suite.step_grid), *suite.prompts)
    if setting.on_gpu:
        free, _ = torch.cuda.mem_get_info(setting.device)
        weights = DTYPE.itemsize * sum(math.prod(shape) for shape in expected_shapes(config).values())
        wanted = min(wanted, (free - weights - KEPT_FREE) // block_bytes(config, suite.block_size, DTYPE))
    begin = time.perf_counter()
    machine = Machine.build(
        setting,
        config,
        DTYPE,
        max_num_seqs=max(batch for batch, _ in suite.step_grid),
        max_model_len=min(longest, config.max_position_embeddings),
        num_blocks=wanted,
    )
    _synchronize(setting)
    report.row("start", what="weights, cache, buffers", seconds=time.perf_counter() - begin, blocks=wanted)
    return machine


@dataclass(frozen=True, slots=True)
class _StepTimes:
    """A captured step by itself, and launched again and again with all that the host does for it."""

    replay: Timing
    launch: Timing


class _Steps:
    """The measurements of one machine."""

    def __init__(self, setting: Setting, report: Report, machine: Machine) -> None:
        self._setting, self._report, self._machine = setting, report, machine
        self._copy_rate = report.figures().get(COPY)
        self._graphs: dict[bool, DecodeGraphs] = {}

    def capture(self) -> None:
        """Graphs of all batch sizes, with and without dependent launch: how long that takes, and how large they are."""
        sizes = sorted({batch for batch, _ in self._setting.suite.step_grid})
        for pdl in (False, True) if supports_pdl(self._setting.device) else (False,):
            with self._report.attempt(f"graphs, dependent launch {pdl}"):
                self._machine.kernels.pdl = pdl
                # The first time compiles the kernels as well, which a server does once in its life.
                for attempt in ("first", "again"):
                    self._graphs.pop(pdl, None)
                    gc.collect()
                    free, begin = self._free_memory(), time.perf_counter()
                    self._graphs[pdl] = self._machine.graphs(sizes)
                    _synchronize(self._setting)
                    self._report.row(
                        "start",
                        what=f"{len(sizes)} graphs, {attempt}",
                        seconds=time.perf_counter() - begin,
                        dependent=pdl,
                        memory_mb=(free - self._free_memory()) / 1e6,
                    )
        self._machine.kernels.pdl = False

    def decode(self, zeros: float) -> None:
        """Steps in which each token has zeros of its own, with and without dependent launch."""
        suite, report = self._setting.suite, self._report
        plant_zeros(self._machine.model, zeros)
        for batch, context in suite.step_grid:
            if not self._fits(batch, context):
                report.note(f"{batch} x {context}: a cache of {self._machine.cache.num_blocks} blocks does not hold it")
                continue
            # What zeros change is the weights' part of a small step, whatever its context.
            if zeros not in (0.0, max(suite.zero_fractions)) and (batch > 16 or context > 512):
                continue
            with report.attempt(f"{batch} x {context}"):
                step = self._batch(batch, context)
                seen = self._seen(step)
                for pdl, graphs in self._graphs.items():
                    if not pdl or context <= 512:
                        self._decode_row(batch, context, zeros, seen, self._times(graphs, step), pdl)

    def _decode_row(
        self, batch: int, context: int, zeros: float, seen: SeenZeros, times: _StepTimes, pdl: bool
    ) -> None:
        suite, report = self._setting.suite, self._report
        needed = step_bytes(suite.config, batch, context - 1, seen.unread)
        floor = needed / self._copy_rate if self._copy_rate else None
        rate = batch / times.launch.seconds
        report.row(
            "decode steps",
            batch=batch,
            context=context,
            zeros=seen.zeros,
            unread_rows=seen.unread,
            dependent=pdl,
            ms=times.launch.median / 1e3,
            ms_p10=times.launch.low / 1e3,
            ms_p90=times.launch.high / 1e3,
            replay_ms=times.replay.median / 1e3,
            tokens_s=rate,
            floor_ms=None if floor is None else floor * 1e3,
            of_floor=None if floor is None else floor / times.launch.seconds,
        )
        if pdl:  # not how the server runs
            return
        for name, fraction in ((DENSE_TOKENS, 0.0), (SPARSE_TOKENS, 0.9)):
            if (batch, context) == suite.step_grid[0] and zeros == fraction:
                report.figure(name, rate)
        if (batch, context) == (64, 512) and zeros == 0.0:
            report.figure(STEP_64, times.launch.median / 1e3)

    def prompts(self) -> None:
        """Whole prompts in chunks, first token included."""
        suite, device, ceiling = self._setting.suite, self._setting.device, self._report.figures().get(MATMUL)
        for tokens in suite.prompts:
            if not self._fits(1, tokens):
                continue
            with self._report.attempt(f"a prompt of {tokens}"):
                steps, runner = self._prompt(tokens), self._machine.runner(None)
                timing = time_loop(
                    partial(_all, [partial(runner.launch, step) for step in steps]), device, self._seconds
                )
                rate = prompt_flops(suite.config, tokens) / timing.seconds
                self._report.row(
                    "prompts",
                    tokens=tokens,
                    ms=timing.median / 1e3,
                    ms_p10=timing.low / 1e3,
                    ms_p90=timing.high / 1e3,
                    tokens_s=tokens / timing.seconds,
                    tflop_s=rate / 1e12,
                    of_matmul=rate / ceiling if ceiling else None,
                )
                if tokens == 2048 and ceiling:
                    self._report.figure(PREFILL_SHARE, rate / ceiling)

    def _prompt(self, tokens: int) -> list[list[SequenceInput]]:
        """The steps of a random prompt."""
        suite, dice = self._setting.suite, random.Random(self._setting.seed)
        (table,) = self._machine.tables([tokens])
        prompt = dice.choices(range(suite.config.vocab_size), k=tokens)
        starts = range(0, tokens, suite.chunk)
        return [
            [
                SequenceInput(
                    token_ids=prompt[at : at + suite.chunk],
                    start=at,
                    block_table=table,
                    samplings=[GREEDY] if at == starts[-1] else [],
                )
            ]
            for at in starts
        ]

    def sampling(self) -> None:
        """What drawing takes in addition to the output projection, and the steps that do it."""
        suite, model, kernels = self._setting.suite, self._machine.model, self._machine.kernels
        for batch in sorted({1, 64} & {batch for batch, _ in suite.step_grid}):
            context = min(512, self._machine.max_model_len - 1)
            if not self._fits(batch, context):
                continue
            hidden = torch.randn(batch, suite.config.hidden_size, device=self._setting.device).to(DTYPE)
            logits = torch.zeros(batch, suite.config.vocab_size, device=self._setting.device)
            variants: dict[str, list[Call]] = {"projection alone": [partial(torch.mm, hidden, model.head.rows.t())]}
            for name, params in DRAWS.items():
                inputs = self._draw_inputs(
                    [replace(params, asked=replace(params.asked, seed=row)) for row in range(batch)]
                )
                draw = [partial(kernels.sample, hidden, model.head, inputs.draw, inputs.live, logits)]
                if params.asked.truncates:
                    draw += [partial(kernels.sample_truncated, logits, inputs.draw, inputs.truncation, inputs.live)]
                variants[name] = [partial(_all, draw)]
            timed = time_variants(variants, self._setting.device, self._setting.suite.seconds_per_figure)
            for name, params in DRAWS.items():
                step = [
                    replace(item, samplings=[replace(params, asked=replace(params.asked, seed=row))])
                    for row, item in enumerate(self._batch(batch, context))
                ]
                launch = self._times(self._graphs[False], step).launch
                share = (timed[name].median - timed["projection alone"].median) / launch.median
                self._report.row(
                    "sampling",
                    what=name,
                    batch=batch,
                    context=context,
                    step_ms=launch.median / 1e3,
                    us=timed[name].median,
                    projection_alone_us=timed["projection alone"].median,
                    share_of_step=share,
                )
                if batch == 64 and name == "temperature":
                    self._report.figure(SAMPLING_SHARE, share)

    def _draw_inputs(self, params: Sequence[RowSampling]) -> StepInputs:
        rows = len(params)
        host, on_device = (StepBuffer(rows, 0, device) for device in (torch.device("cpu"), self._setting.device))
        write_draw(host.inputs(rows), params)
        on_device.words.copy_(host.words)
        return on_device.inputs(rows)

    def chains(self) -> None:
        """Steps that feed each other on the device, and steps that wait for the tokens of the one before."""
        suite, graphs = self._setting.suite, self._graphs[False]
        runner = self._machine.runner(graphs)
        for batch in suite.chain_batches:
            context = min(512, self._machine.max_model_len - suite.chain_steps)
            if not self._fits(batch, context):
                continue
            step = self._batch(batch, context)
            alone = self._times(graphs, step).replay.median / 1e3
            taken = [
                [self._chain(runner, step, waits=waits) for waits in (False, True)] for _ in range(suite.chain_rounds)
            ]
            fed, fetched = (statistics.median(times) for times in zip(*taken, strict=True))
            self._report.row(
                "consecutive steps",
                batch=batch,
                context=context,
                replay_ms=alone,
                fed_ms=fed,
                fed_idle_us=1e3 * (fed - alone),
                fetched_ms=fetched,
                fetched_idle_us=1e3 * (fetched - alone),
            )

    def _chain(self, runner: Runner, step: Sequence[SequenceInput], *, waits: bool) -> float:
        """Milliseconds of each of some consecutive steps."""
        fed: Sequence[int] = [item.token_ids[0] for item in step]
        before: PendingStep | None = None
        _synchronize(self._setting)
        begin = time.perf_counter()
        steps = self._setting.suite.chain_steps
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
        _synchronize(self._setting)
        return (time.perf_counter() - begin) / steps * 1e3

    def skipping(self) -> None:
        """Steps that read, and steps that do not read, what meets only zeros: places of each token's own, or shared."""
        suite, machine = self._setting.suite, self._machine
        captured: list[DecodeGraphs] = []
        for most_tokens in (max(suite.sparse_batches), 0):
            with skipping(machine.kernels, most_tokens):
                captured.append(machine.graphs(suite.sparse_batches))
        for shared in (False, True):
            plant_zeros(machine.model, max(suite.zero_fractions), shared=shared)
            for batch in suite.sparse_batches:
                step = self._batch(batch, suite.sparse_context)
                seen = self._seen(step)
                sparse, dense = (self._times(graphs, step).launch for graphs in captured)
                self._report.row(
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

    def launches(self) -> None:
        """The kernels of a captured step and the gaps between them, as the profiler sees them."""
        if not self._setting.on_gpu:
            self._report.note("launches are counted on a GPU")
            return
        batch, context = self._setting.suite.step_grid[0]
        for pdl, graphs in self._graphs.items():
            launch = partial(graphs.launch, self._batch(batch, context))
            profile_launches(self._report, launch, batch=batch, context=context, dependent=pdl)

    @property
    def _seconds(self) -> float:
        return 4 * self._setting.suite.seconds_per_figure

    def _times(self, graphs: DecodeGraphs, step: Sequence[SequenceInput]) -> _StepTimes:
        device = self._setting.device
        launch = time_loop(partial(graphs.launch, step), device, self._seconds)
        # Without a GPU there is no graph to replay, so there is no figure.
        captured = graphs.graph(len(step))
        return _StepTimes(time_loop(captured.replay, device, self._seconds / 2) if captured else launch, launch)

    def _seen(self, step: Sequence[SequenceInput]) -> SeenZeros:
        """The zeros of a step like this one, run eagerly; large steps do not skip, and none are counted there."""
        with seen_zeros() as seen:
            self._machine.runner(None).run(step)
        return seen

    def _batch(self, batch: int, context: int) -> list[SequenceInput]:
        """A step of `batch` sequences, with room for a chain of steps if the model has it."""
        room = min(context + self._setting.suite.chain_steps, self._machine.max_model_len)
        dice = random.Random(self._setting.seed)
        tokens = [dice.randrange(self._setting.suite.config.vocab_size) for _ in range(batch)]
        return decode_batch([context] * batch, self._machine.tables([room] * batch), tokens)

    def _fits(self, batch: int, context: int) -> bool:
        room = min(context + self._setting.suite.chain_steps, self._machine.max_model_len)
        blocks = batch * -(-room // self._machine.cache.block_size)
        return context <= self._machine.max_model_len and blocks <= self._machine.cache.num_blocks

    def _free_memory(self) -> int:
        if not self._setting.on_gpu:
            return 0
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._setting.device)[0]


def _all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _synchronize(setting: Setting) -> None:
    if setting.on_gpu:
        torch.cuda.synchronize()
