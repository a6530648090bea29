"""The first minute: the most informative checks of the kernels, on two layers of the network and its head.

Whole steps in float16 are right, repeatable and the same captured, padded, alone and without skipping; then the time of
a whole step is predicted from that of two layers and of one, next to what the card copies.
"""

import random
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.floors import prompt_flops, step_bytes
from benchmarks.gpu import targets
from benchmarks.gpu.model import GREEDY, Machine, decode_batch, plant_zeros
from benchmarks.gpu.predictions import STEPS, predicted_us
from benchmarks.gpu.report import Report
from benchmarks.gpu.step_check import StepCheck, attempt_checks
from benchmarks.gpu.suite import Setting
from benchmarks.gpu.timing import Timing, time_loop
from persimmon.kernels.launch import KernelsUnavailableError, check_gpu, supports_pdl
from persimmon.model.cuda_graphs import DecodeGraphs
from persimmon.model.runner import SequenceInput

DTYPE = torch.float16
COMPILATION_S = 12.0
"""Longest wait for kernels that other processes compile; what is missing then is compiled here."""


def run(setting: Setting, report: Report) -> None:
    """Correctness, then speed; the risky launches last."""
    report.note(f"seed {setting.seed}")
    if setting.on_gpu:
        try:
            check_gpu(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
        except KernelsUnavailableError as error:
            report.note(f"a server would not start here: {error}")
    if not setting.wait_for_kernels(COMPILATION_S):
        report.note(f"kernels are still being compiled after {COMPILATION_S:g} s")
    check = report.prepare("two layers", lambda: StepCheck(setting, report, DTYPE))
    attempt_checks(check, report)
    prediction = _Prediction(setting, report, check.machine)
    for zeros in setting.suite.zero_fractions:
        report.attempt(f"steps at {zeros} zeros", partial(prediction.steps, zeros), seconds=3)
    report.attempt("a prompt", prediction.prompt, seconds=2)
    if supports_pdl(setting.device):
        report.attempt("dependent launch", check.dependent, seconds=6)
        report.attempt("steps, dependent launch", partial(prediction.steps, 0.0, pdl=True), seconds=3)


class _Prediction:
    """The time of the whole network from that of its first layers.

    Layers are alike, so each further one takes what the last of two adds to the first.
    """

    def __init__(self, setting: Setting, report: Report, machine: Machine) -> None:
        self._setting, self._report = setting, report
        self._two, self._one = machine, machine.shallow(machine.model.config.num_hidden_layers - 1)
        self._figures = report.figures()

    def steps(self, zeros: float, *, pdl: bool = False) -> None:
        """Decode steps with a share of zero activations."""
        suite, report, copy_rate = self._setting.suite, self._report, self._figures.get(targets.COPY)
        plant_zeros(self._two.model, zeros, shared=True)
        self._two.kernels.pdl = pdl
        graphs = [machine.graphs([batch for batch, _ in suite.smoke_grid]) for machine in (self._two, self._one)]
        self._two.kernels.pdl = False
        for batch, context in suite.smoke_grid:
            step = self._step(batch, context)
            two, one = (self._replay(own, step) for own in graphs)
            whole = self._whole(two.seconds, one.seconds)
            floor = step_bytes(suite.config, batch, context - 1, zeros if batch <= 16 else 0.0)
            share = floor / copy_rate / whole if copy_rate else None
            report.row(
                "predicted steps",
                batch=batch,
                context=context,
                zeros=zeros,
                dependent=pdl,
                two_layers_us=two.median,
                layer_us=(two.median - one.median) / self._added,
                step_ms=whole * 1e3,
                roofline_ms=self._roofline_ms(batch, context, zeros),
                tokens_s=batch / whole,
                of_floor=share,
            )
            name = {(1, 0.0): targets.DENSE_1, (1, 0.9): targets.SPARSE_1, (64, 0.0): targets.STEP_64}.get(
                (batch, zeros)
            )
            if name and share is not None and not pdl:
                about = f"{whole * 1e3:.2f} ms, at least {share * whole * 1e3:.2f}; {batch / whole:.0f} tokens/s"
                report.figure(targets.PREDICTED + name, share, about)

    def prompt(self) -> None:
        """One prompt in one chunk, launched kernel by kernel."""
        suite, matmul = self._setting.suite, self._figures.get(targets.MATMUL)
        tokens = suite.smoke_prompt
        (table,) = self._two.tables([tokens])
        prompt = random.Random(self._setting.seed).choices(range(suite.config.vocab_size), k=tokens)
        step = [SequenceInput(token_ids=prompt, start=0, block_table=table, samplings=[GREEDY])]
        two, one = (
            time_loop(partial(machine.runner(None).launch, step), self._setting.device, suite.seconds_per_figure)
            for machine in (self._two, self._one)
        )
        whole = self._whole(two.seconds, one.seconds)
        rate = prompt_flops(suite.config, tokens) / whole
        share = rate / matmul if matmul else None
        self._report.row(
            "predicted prompt",
            tokens=tokens,
            two_layers_us=two.median,
            prompt_ms=whole * 1e3,
            tokens_s=tokens / whole,
            of_matmul=share,
        )
        if share is not None and tokens == 2048:
            about = f"{whole * 1e3:.1f} ms, {tokens / whole:.0f} tokens/s"
            self._report.figure(targets.PREDICTED + targets.PROMPT_2K, share, about)

    def _roofline_ms(self, batch: int, context: int, zeros: float) -> float | None:
        """What `benchmarks.roofline` predicts from machine code, with plain launches."""
        step = STEPS.get(zeros)
        predicted = None if step is None else predicted_us(self._setting, batch, step, context)
        return None if predicted is None else predicted / 1e3

    @property
    def _added(self) -> int:
        """How many more layers the deeper machine has."""
        return len(self._two.model.layers) - len(self._one.model.layers)

    def _whole(self, deeper: float, shallower: float) -> float:
        missing = self._setting.suite.config.num_hidden_layers - len(self._two.model.layers)
        return deeper + missing * (deeper - shallower) / self._added

    def _step(self, batch: int, context: int) -> Sequence[SequenceInput]:
        dice = random.Random(self._setting.seed)
        tokens = [dice.randrange(self._setting.suite.config.vocab_size) for _ in range(batch)]
        return decode_batch([context] * batch, self._two.tables([context] * batch), tokens)

    def _replay(self, graphs: DecodeGraphs, step: Sequence[SequenceInput]) -> Timing:
        graphs.launch(step)
        captured = graphs.graph(len(step))
        call = captured.replay if captured else partial(graphs.launch, step)
        return time_loop(call, self._setting.device, self._setting.suite.seconds_per_figure)
