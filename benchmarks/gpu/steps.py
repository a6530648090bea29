"""How fast are whole steps?  The network with random weights and planted zeros, as the engine runs it.

Decode steps are CUDA graphs.  A floor is the bytes that a step must read, over the copy rate of this card.
"""

import random
from collections.abc import Sequence
from functools import partial

from benchmarks.floors import prompt_flops, step_bytes
from benchmarks.gpu import targets
from benchmarks.gpu.model import GREEDY, SeenZeros, plant_zeros
from benchmarks.gpu.predictions import STEPS, predicted_us
from benchmarks.gpu.profile import profile_launches
from benchmarks.gpu.report import Report
from benchmarks.gpu.step_bench import StepBench, StepTimes
from benchmarks.gpu.step_parts import chains, sampling, skipped, weights_ahead
from benchmarks.gpu.suite import Setting
from benchmarks.gpu.timing import Call, time_loop
from persimmon.kernels.launch import supports_pdl
from persimmon.model.runner import SequenceInput


def run(setting: Setting, report: Report) -> None:
    """What the targets need first; dependent launch last, because it has never run."""
    suite = setting.suite
    bench = report.prepare("weights and graphs", partial(_start, setting, report))
    for count, (batch, context) in enumerate(suite.step_grid):
        for zeros in suite.zero_fractions:
            # What zeros change is the weights' part of a small step, whatever its context.
            if zeros and (batch > 16 or context > 512):
                continue
            what = f"{batch} x {context}, {zeros} zeros"
            report.attempt(what, partial(_decode, bench, batch, context, zeros), seconds=2)
        if count == 1:
            for tokens in suite.prompts[:1]:
                report.attempt(f"a prompt of {tokens}", partial(_prompt, bench, tokens), seconds=2)
            for batch_size in suite.chain_batches:
                what = f"consecutive steps of {batch_size}"
                report.attempt(what, partial(chains, bench, batch_size), seconds=2)
            report.attempt("sampling", partial(sampling, bench), seconds=3)
    report.attempt("launches", partial(_launches, bench, pdl=False), seconds=5)
    for tokens in suite.prompts[1:]:
        report.attempt(f"a prompt of {tokens}", partial(_prompt, bench, tokens), seconds=2)
    report.attempt("skipping", partial(skipped, bench), seconds=6)
    report.attempt("weights ahead", partial(weights_ahead, bench), seconds=4)
    if supports_pdl(setting.device):
        report.attempt("graphs, dependent launch", partial(bench.capture, pdl=True), seconds=5)
        for batch, context in suite.step_grid[:3]:
            what = f"{batch} x {context}, dependent launch"
            report.attempt(what, partial(_decode, bench, batch, context, 0.0, pdl=True), seconds=2)
        report.attempt("launches, dependent launch", partial(_launches, bench, pdl=True), seconds=5)


def _start(setting: Setting, report: Report) -> StepBench:
    bench = StepBench(setting, report)
    bench.capture()
    return bench


def _decode(bench: StepBench, batch: int, context: int, zeros: float, *, pdl: bool = False) -> None:
    """Steps in which each token has zeros of its own."""
    if not bench.fits(batch, context) or pdl not in bench.graphs:
        return
    plant_zeros(bench.machine.model, zeros)
    step = bench.batch(batch, context)
    _decode_row(bench, batch, context, zeros, bench.seen(step), bench.times(bench.graphs[pdl], step), pdl)


def _decode_row(
    bench: StepBench, batch: int, context: int, zeros: float, seen: SeenZeros, times: StepTimes, pdl: bool
) -> None:
    suite, report, copy_rate = bench.setting.suite, bench.report, bench.report.figures().get(targets.COPY)
    needed = step_bytes(suite.config, batch, context - 1, seen.unread)
    floor = needed / copy_rate if copy_rate else None
    of_floor = None if floor is None else floor / times.launch.seconds
    step = STEPS.get(zeros)
    predicted = None if step is None or pdl else predicted_us(bench.setting, batch, step, context)
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
        predicted_ms=None if predicted is None else predicted / 1e3,
        tokens_s=batch / times.launch.seconds,
        floor_ms=None if floor is None else floor * 1e3,
        of_floor=of_floor,
    )
    names = {
        (*suite.step_grid[0], 0.0): targets.DENSE_1,
        (*suite.step_grid[0], 0.9): targets.SPARSE_1,
        (64, 512, 0.0): targets.STEP_64,
    }
    name = names.get((batch, context, zeros))
    if name and floor is not None and of_floor is not None and not pdl:
        rate = batch / times.launch.seconds
        ms = times.launch.median / 1e3
        report.figure(name, of_floor, f"{ms:.2f} ms, at least {floor * 1e3:.2f}; {rate:.0f} tokens/s")


def _prompt(bench: StepBench, tokens: int) -> None:
    """A whole prompt in chunks, first token included."""
    if not bench.fits(1, tokens):
        return
    suite, ceiling = bench.setting.suite, bench.report.figures().get(targets.MATMUL)
    steps, runner = _prompt_steps(bench, tokens), bench.machine.runner(None)
    calls: list[Call] = [partial(runner.launch, step) for step in steps]
    timing = time_loop(partial(_all, calls), bench.setting.device, 4 * suite.seconds_per_figure)
    rate = prompt_flops(suite.config, tokens) / timing.seconds
    bench.report.row(
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
        about = f"{timing.median / 1e3:.1f} ms, {tokens / timing.seconds:.0f} tokens/s"
        bench.report.figure(targets.PROMPT_2K, rate / ceiling, about)


def _prompt_steps(bench: StepBench, tokens: int) -> list[list[SequenceInput]]:
    """The steps of a random prompt."""
    suite, dice = bench.setting.suite, random.Random(bench.setting.seed)
    (table,) = bench.machine.tables([tokens])
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


def _launches(bench: StepBench, *, pdl: bool) -> None:
    """The kernels of a captured step and the gaps between them, as the profiler sees them."""
    if not bench.setting.on_gpu:
        bench.report.note("launches are counted on a GPU")
        return
    if pdl not in bench.graphs:
        return
    batch, context = bench.setting.suite.step_grid[0]
    launch = partial(bench.graphs[pdl].launch, bench.batch(batch, context))
    profile_launches(bench.report, launch, batch=batch, context=context, dependent=pdl)


def _all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()
