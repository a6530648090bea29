"""Do guesses change nothing, and what do they take?  Steps with several tokens a sequence against steps of single ones.

Each of the tokens is a row of its step, so it must have the bits that it has in a step by itself.
"""

import random
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.gpu.compare import check_same
from benchmarks.gpu.model import Machine, plant_zeros
from benchmarks.gpu.report import Report
from benchmarks.gpu.suite import Setting
from benchmarks.gpu.timing import time_loop
from persimmon.model.cuda_graphs import DecodeGraphs
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import SequenceInput
from persimmon.model.sampling_params import SamplingParams

DTYPE = torch.float16


def run(setting: Setting, report: Report) -> None:
    """Bits first, then times of every width."""
    bench = report.prepare("weights, cache and graphs", partial(GuessBench, setting, report))
    for batch, context in setting.suite.guess_grid:
        report.attempt(f"{batch} x {context}: bits", partial(bench.check, batch, context), seconds=2)
        report.attempt(f"{batch} x {context}: times", partial(bench.measure, batch, context), seconds=2)


class GuessBench:
    """A network with few layers, a filled cache, and graphs of all widths.

    Args:
        setting: the suite.
        report: gets the outcomes.
    """

    def __init__(self, setting: Setting, report: Report) -> None:
        suite = setting.suite
        self._setting, self._report = setting, report
        most = max(suite.guess_widths)
        blocks = max(batch * -(-(context + most) // suite.block_size) for batch, context in suite.guess_grid)
        self._machine = Machine.build(setting, DTYPE, num_blocks=blocks, layers=suite.smoke_layers)
        plant_zeros(self._machine.model, 0.9)
        batches = {batch for batch, _ in suite.guess_grid}
        rows = {batch * width for batch in batches for width in suite.guess_widths if width > 1}
        self._graphs: DecodeGraphs = self._machine.graphs(sorted(batches), sorted(rows))

    def check(self, batch: int, context: int) -> None:
        """One step of the widest kind against as many steps of single tokens: draws, and what is in the cache."""
        width = max(self._setting.suite.guess_widths)
        step = self._step(batch, context, width)
        single: list[list[torch.Tensor]] = []
        for place in range(width):
            alone = [
                SequenceInput(
                    token_ids=[item.token_ids[place]],
                    start=item.start + place,
                    block_table=item.block_table,
                    samplings=[item.samplings[place]],
                )
                for item in step
            ]
            single.append(self._drawn(alone))
        cache = self._machine.cache.layers[-1]
        expected = [*(torch.stack(rows, 1).flatten() for rows in zip(*single, strict=True))]
        expected += [cache.keys.clone(), cache.values.clone()]
        self._forget(step)
        made = [*self._drawn(step), cache.keys, cache.values]
        check_same(self._report, f"{batch} x {context}: {width} tokens in a step = one a step", made, expected)

    def measure(self, batch: int, context: int) -> None:
        """Steps of each width; one token a sequence is the plain decode step."""
        suite = self._setting.suite
        alone = None
        for width in suite.guess_widths:
            launch = partial(self._graphs.launch, self._step(batch, context, width))
            taken = time_loop(launch, self._setting.device, 4 * suite.seconds_per_figure)
            alone = alone or taken.median
            self._report.row(
                "steps with guesses",
                batch=batch,
                context=context,
                tokens=width,
                layers=suite.smoke_layers,
                **taken.columns,
                of_one_token=taken.median / alone if alone else None,
            )

    def _step(self, batch: int, context: int, width: int) -> list[SequenceInput]:
        """Sequences of `context` tokens, of which the last `width` are computed, each drawn in its own way."""
        dice = random.Random(self._setting.seed)
        tables = self._machine.tables([context + width] * batch)
        return [
            SequenceInput(
                token_ids=dice.choices(range(self._setting.suite.config.vocab_size), k=width),
                start=context,
                block_table=table,
                samplings=[
                    RowSampling(asked=SamplingParams(temperature=0.8, seed=row), position=place)
                    for place in range(width)
                ],
                guesses=width - 1,
            )
            for row, table in enumerate(tables)
        ]

    def _drawn(self, step: Sequence[SequenceInput]) -> list[torch.Tensor]:
        """The tokens of a step, and their log-probabilities."""
        tokens = self._graphs.launch(step).tokens
        return [tokens.clone(), self._machine.logprobs(len(tokens)).clone()]

    def _forget(self, step: Sequence[SequenceInput]) -> None:
        """Makes the keys and values of a step's tokens NaN, so that none is there that the step has not written."""
        size = self._machine.cache.block_size
        for item in step:
            for position in range(item.start, item.start + len(item.token_ids)):
                for tensor in self._machine.cache.tensors:
                    tensor[item.block_table[position // size], :, position % size] = torch.nan
