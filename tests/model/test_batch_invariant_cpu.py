"""The C kernels: a request's tokens and log-probabilities have the same bits whatever else runs, in every dtype."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from persimmon import kernels
from persimmon.kernels import KernelsUnavailableError
from persimmon.kernels.cpu import library
from persimmon.kernels.cpu.native import NativeKernels
from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.logprobs import LogprobRows, log_totals_by_halves
from persimmon.model.persimmon import Persimmon
from persimmon.model.quantization.scheme import Quantization, quantized_formats
from persimmon.model.sampling_params import SamplingParams
from persimmon.server.engine.sequence import Sequence as EngineSequence
from tests.cpu_builds import FLOAT_BUILDS
from tests.engine_harness import CPU, Harness, blocks_for, new_tokens

NEW_TOKENS = 48
PROMPT_LENGTHS = (1, 40, 7, 33, 150, 24, 2, 50)

pytestmark = pytest.mark.skipif(not library.builds(), reason="no build of the C kernels for this processor")


def prompts() -> list[list[int]]:
    """Of many lengths; all but the shortest begin alike."""
    beginning = random.Random(0).choices(range(2, 4096), k=20)
    return [
        (beginning + random.Random(length).choices(range(2, 4096), k=length))[: max(length, 1)]
        for length in PROMPT_LENGTHS
    ]


def sampling(index: int) -> SamplingParams:
    return SamplingParams(temperature=0.0 if index % 2 else 1.0, top_p=0.9, seed=index, logprobs=4 + index)


def answers(engine: Harness, chosen: Sequence[int], arrivals: Sequence[int] | None = None) -> list[tuple]:
    """Tokens and log-probabilities of some of the prompts, run at once."""
    every = prompts()
    sequences = [
        EngineSequence(
            key=key,
            token_ids=list(every[index]),
            max_tokens=NEW_TOKENS,
            sampling=sampling(index),
            prompt_logprobs=2 if index % 3 == 0 else None,
        )
        for key, index in enumerate(chosen)
    ]
    engine.run(sequences, arrivals)
    return [(new_tokens(sequence), engine.reports[sequence]) for sequence in sequences]


@pytest.mark.parametrize(
    ("build", "dtype", "quantization", "cache_dtype"),
    [
        *((build, torch.float32, None, None) for build in FLOAT_BUILDS[1:]),
        *(
            (build, dtype, None, None)
            for build in FLOAT_BUILDS[:1]
            for dtype in (torch.float32, torch.float16, torch.bfloat16)
        ),
        *(
            (build, torch.float32, quantization, None)
            for build in library.builds()[:1]
            for quantization in ("int8", "int4")
        ),
        *((build, torch.float32, None, torch.int8) for build in (FLOAT_BUILDS[0], FLOAT_BUILDS[-1])),
    ],
)
def test_alone_among_others_from_the_cache_preempted_and_in_any_chunks(
    random_checkpoint: Path,
    build: str,
    dtype: torch.dtype,
    quantization: Quantization | None,
    cache_dtype: torch.dtype | None,
) -> None:
    operations = NativeKernels(build, dtype)
    config = PersimmonConfig.from_folder(random_checkpoint)
    formats = quantized_formats(config, quantization) if quantization else {}
    tensors = Checkpoint.open(random_checkpoint, config).parameters(formats)
    model = Persimmon(config=config, tensors=tensors, dtype=dtype, device=CPU, kernels=operations)
    everything = range(len(PROMPT_LENGTHS))
    blocks = blocks_for([len(prompt) + NEW_TOKENS for prompt in prompts()], 16)

    def engine(num_blocks: int = blocks, **options: int | bool) -> Harness:
        made = {"num_blocks": num_blocks, "operations": operations, "cache_dtype": cache_dtype, **options}
        return Harness(model, **made)  # type: ignore[arg-type]

    alone = [answers(engine(), [index])[0] for index in everything]
    assert answers(engine(), everything) == alone
    for budget in (8, 13, 100):
        chunked = engine(max_num_batched_tokens=budget, max_num_seqs=8)
        assert answers(chunked, everything, arrivals=[0, 5, 3, 2, 1, 0, 7, 4]) == alone
    scarce = engine(round(0.4 * blocks), prefix_caching=True)
    assert answers(scarce, everything) == alone
    assert answers(scarce, everything) == alone
    assert scarce.stats.preemptions > 0
    assert scarce.stats.cached_tokens > 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_one_row_is_reported_as_it_is_among_several(threads: int) -> None:
    """torch sums a single row of many numbers with all threads: of some rows the last bit is then another."""
    before = torch.get_num_threads()
    logits = torch.randn(16, 70_001, generator=torch.Generator().manual_seed(1))
    tokens = torch.arange(16)
    try:
        torch.set_num_threads(threads)
        many = LogprobRows.of(logits, tokens, 8)
        few = [LogprobRows.of(logits[row : row + 1].clone(), tokens[row : row + 1], 5) for row in range(16)]
        few.append(LogprobRows.of(logits[2:4].clone(), tokens[2:4], 5))
    finally:
        torch.set_num_threads(before)
    for rows, one in zip([*(slice(row, row + 1) for row in range(16)), slice(2, 4)], few, strict=True):
        assert torch.equal(one.logprobs, many.logprobs[rows])
        assert torch.equal(one.top_logprobs, many.top_logprobs[rows, :5])


def test_totals_by_halves_are_totals_whatever_the_number_of_rows() -> None:
    for width in (1, 2, 7, 1000):
        logits = torch.randn(5, width, generator=torch.Generator().manual_seed(width)) * 4
        totals = log_totals_by_halves(logits)
        torch.testing.assert_close(totals, logits.logsumexp(-1))
        assert torch.equal(log_totals_by_halves(logits[3:4].clone()), totals[3:4])


def test_of_equal_logits_those_with_the_lowest_ids_are_reported_however_many_are_asked_for() -> None:
    logits = torch.zeros(1, 300)
    logits[0, [7, 250]] = 2.0
    logits[0, 3] = -0.0
    for top in (2, 3, 20):
        rows = LogprobRows.of(logits, torch.tensor([0]), top)
        assert rows.top_ids[0].tolist() == [7, 250, *range(7), *range(8, 30)][:top]


def test_plain_torch_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "builds", list)
    with pytest.raises(KernelsUnavailableError, match="--batch-invariant needs the C kernels on a CPU"):
        kernels.for_device(CPU, batch_invariant=True)


def test_the_c_kernels_need_nothing_for_it() -> None:
    assert isinstance(kernels.for_device(CPU, batch_invariant=True), NativeKernels)
