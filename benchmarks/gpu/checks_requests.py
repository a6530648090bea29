"""Are rows whose requests change logits, or ask for log-probabilities, what plain torch on the host makes of them?"""

import random
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.inputs import normal
from benchmarks.gpu.model import limits
from benchmarks.gpu.report import Report
from benchmarks.gpu.suite import Setting
from persimmon.kernels import reference_sampling
from persimmon.kernels.fused import FusedKernels
from persimmon.kernels.fused_weight import FusedWeight
from persimmon.kernels.operands import DrawInputs, TruncationInputs
from persimmon.model.adjustments import adjust_, penalize
from persimmon.model.fused_sampler import FusedSampler
from persimmon.model.row_sampling import RowSampling
from persimmon.model.sampling_params import SamplingParams
from persimmon.model.step_inputs import StepBuffer, write_draw
from persimmon.model.token_counts import TokenCounts

KINDS = 6
"""Of rows: what each changes in its logits."""

LOGPROB_ERROR = 1e-3
"""Sums over 262,144 terms in float32, and logits of 16-bit products."""


def _params(rows: int, vocab_size: int, dice: random.Random) -> list[RowSampling]:
    """Rows with penalties, biases, bans and masks, one by one and together, greedy and drawn."""

    def seen() -> TokenCounts:
        counts = TokenCounts([dice.randrange(vocab_size) for _ in range(300)])
        for _ in range(200):
            counts.append(dice.randrange(vocab_size))
        return counts

    def mask() -> np.ndarray:
        words = np.array([dice.getrandbits(32) for _ in range(-(-vocab_size // 32))], dtype=np.uint32)
        return words.view(np.int32)

    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.25}
    biases = {dice.randrange(vocab_size // 10) + vocab_size // 10 * place: 3.0 for place in range(10)}
    masks = [mask() for _ in range(2)]
    kinds: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"seen": seen()}, penalties),
        ({}, {"logit_bias": biases}),
        ({"banned": tuple(dice.sample(range(vocab_size), vocab_size // 100))}, {}),
        ({"allowed": lambda: masks[0]}, {}),
        ({"seen": seen(), "allowed": lambda: masks[1]}, {"logit_bias": biases, **penalties}),
        ({}, {}),
    ]
    params = []
    for row in range(rows):
        temperature = (0.0, 1.0)[row // KINDS % 2]
        top = (None, 0, 5, 20)[row % 4]
        own, request = kinds[row % KINDS]
        asked = SamplingParams(temperature=temperature, seed=dice.randrange(2**63), logprobs=top, **request)
        params.append(RowSampling(asked=asked, position=row, **own))
    return params


def check_changed_logits(setting: Setting, report: Report, dtype: torch.dtype, name: str) -> None:
    """One step of rows that ask for everything in turn, by the sampler that the server uses."""
    config, device = setting.suite.config, setting.device
    rows = min(max(setting.suite.check_batch, 2 * KINDS), setting.suite.max_num_seqs)
    title, vocab_size = f"changed logits, {name}", config.vocab_size
    generator = setting.generator()
    weight = FusedWeight(normal(generator, vocab_size, config.hidden_size, dtype=dtype, deviation=0.03))
    hidden = normal(generator, rows, config.hidden_size, dtype=dtype)
    kernels = FusedKernels(device)
    kernels.reserve(limits(setting.suite))
    params = _params(rows, vocab_size, random.Random(setting.seed))
    samples = FusedSampler(kernels, weight)(hidden, params)
    tokens = samples.tokens.cpu().clone()  # the kernels use their memory again

    # The same logits, as the kernels make them, through plain torch on the host.
    logits = _logits(kernels, hidden, weight).cpu()
    changed = logits.clone()
    adjust_(changed, params, penalize)
    every = torch.zeros(rows, dtype=torch.int32)
    draw = DrawInputs(
        temperature=torch.tensor([own.asked.temperature for own in params]),
        seed=torch.tensor([own.asked.seed for own in params]),
        sample_index=every,
        position=torch.tensor([own.position for own in params], dtype=torch.int32),
        wants_logits=every,
    )
    keeps_all = TruncationInputs(active=every, top_k=every, top_p=torch.ones(rows), min_p=torch.zeros(rows))
    wanted, _ = reference_sampling.sample(changed, draw, keeps_all)
    different = int((tokens != wanted).sum())
    report.check(f"{title}: rows draw what the host does", different == 0, different=different, rows=rows)

    if samples.logprobs is None:
        report.check(f"{title}: log-probabilities are reported", False)
        return
    exact = logits.double().log_softmax(-1)
    entries = samples.logprobs.fetch([params[row].asked.logprobs or 0 for row in samples.reported])
    off = 0.0
    for row, entry in zip(samples.reported, entries, strict=True):
        own = exact[row]
        best = own.topk(len(entry.top_ids)).values
        seen = torch.tensor([entry.logprob, *entry.top_logprobs], dtype=torch.float64)
        ids = torch.tensor([entry.token_id, *entry.top_ids])
        off = max(off, float((seen - own[ids]).abs().max()), float((seen[1:] - best).abs().max()) if len(best) else 0.0)
    report.check(f"{title}: log-probabilities of unchanged logits", off <= LOGPROB_ERROR, off_by=off)


def _logits(kernels: FusedKernels, hidden: torch.Tensor, weight: FusedWeight) -> torch.Tensor:
    """[R, vocab_size] float32, as sampling writes them for rows that are read again."""
    rows = len(hidden)
    host, on_device = StepBuffer(rows, 0, torch.device("cpu")), StepBuffer(rows, 0, hidden.device)
    write_draw(host.inputs(rows), [RowSampling(asked=SamplingParams(temperature=0.0, logprobs=0))] * rows)
    on_device.words.copy_(host.words)
    inputs = on_device.inputs(rows)
    logits = torch.empty(rows, weight.shape[0], dtype=torch.float32, device=hidden.device)
    kernels.sample(hidden, weight, inputs.draw, inputs.live, logits)
    return logits
