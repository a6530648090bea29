"""Are sampling and whole decode steps right?  Against exact logits, float32, and themselves bit for bit."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.checks_attention import check_lengths
from benchmarks.gpu.compare import check_launches, check_repeats, check_same, product_spread, type_name
from benchmarks.gpu.inputs import normal
from benchmarks.gpu.model import Machine, decode_batch, plant_zeros, random_model, seen_zeros, skipping
from benchmarks.gpu.report import Report
from benchmarks.gpu.suite import Setting
from persimmon.kernels import Kernels, LayerCache, reference, reference_sampling, sampling, truncation
from persimmon.kernels.launch import supports_pdl
from persimmon.kernels.operands import DrawInputs, TruncationInputs
from persimmon.model.cuda_graphs import DecodeGraphs
from persimmon.model.kv_cache import KVCache
from persimmon.model.persimmon import Persimmon, Step
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import SequenceInput
from persimmon.model.sampling_params import SamplingParams

VOCABULARY_AT_ONCE = 1 << 15
CHAIN_STEPS = 4
STEP_ERROR = {torch.float16: 1e-2, torch.bfloat16: 8e-2, torch.float32: 1e-4}
"""Norm of a step's error over that of its result: each layer rounds a dozen times."""


def run(setting: Setting, report: Report) -> None:
    """Sampling, then decode steps of a network with few layers."""
    report.note(f"seed {setting.seed}")
    for dtype in [dtype for dtype in setting.suite.check_dtypes if dtype.itemsize == 2]:
        name = type_name(dtype)
        with report.attempt(f"sampling, {name}"):
            _sampling(setting, report, dtype, name)
        with report.attempt(f"decode step, {name}"):
            _decode_step(setting, report, dtype, name)


def _draw_inputs(rows: int, device: torch.device, dice: random.Random) -> DrawInputs:
    """Greedy, cool, plain and hot rows in turn, with seeds of all 63 bits."""

    def int32(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return DrawInputs(
        temperature=torch.tensor([(0.0, 0.3, 1.0, 1.7)[row % 4] for row in range(rows)], device=device),
        seed=torch.tensor([dice.randrange(2**63) for _ in range(rows)], device=device),
        sample_index=int32([row % 3 for row in range(rows)]),
        position=int32([dice.randrange(16384) for _ in range(rows)]),
        wants_logits=int32([1] * rows),
    )


def _rows(draw: DrawInputs, row: int) -> DrawInputs:
    fields = (draw.temperature, draw.seed, draw.sample_index, draw.position, draw.wants_logits)
    return DrawInputs(*(field[row : row + 1].clone() for field in fields))


def _sampling(setting: Setting, report: Report, dtype: torch.dtype, name: str) -> None:
    config, generator, device = setting.suite.config, setting.generator(), setting.device
    rows, vocab_size, title = setting.suite.check_batch, setting.suite.config.vocab_size, f"sampling, {name}"
    weight = normal(generator, vocab_size, config.hidden_size, dtype=dtype, deviation=0.03)
    hidden = normal(generator, rows, config.hidden_size, dtype=dtype)
    draw = _draw_inputs(rows, device, random.Random(setting.seed))
    live = torch.tensor([rows], dtype=torch.int32, device=device)
    workspace = sampling.Workspace.allocate(rows, vocab_size, device)
    logits = torch.full((rows, vocab_size), float("nan"), dtype=torch.float32, device=device)

    def head(pdl: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        return sampling.sample_head(hidden, weight, draw, live, workspace, logits=logits, pdl=pdl)

    tokens, logprobs = (result.clone() for result in head())
    exact, spread = _exact_logits(hidden, weight, dtype)
    error = ((logits.double() - exact).abs() / spread).max().item()
    report.check(f"{title}: logits", error <= 1, error_over_bound=error)
    noise = torch.stack([_noise(draw, row, vocab_size) for row in range(rows)]).to(device)
    scores = exact + draw.temperature[:, None].double() * noise
    behind = scores.max(1).values - scores.gather(1, tokens[:, None])[:, 0]
    report.check(
        f"{title}: the highest score wins", bool((behind <= 2 * spread.max() + 1e-5).all()), behind=behind.max().item()
    )
    wanted = exact.log_softmax(1).gather(1, tokens[:, None])[:, 0]
    off = (logprobs.double() - wanted).abs().max().item()
    report.check(f"{title}: log-probabilities", off <= 2e-4 + 2 * spread.max().item(), off_by=off)

    alone = sampling.Workspace.allocate(1, vocab_size, device)
    one = torch.ones(1, dtype=torch.int32, device=device)
    pairs = []
    for row in sorted({0, rows // 2, rows - 1}):
        own = sampling.sample_head(hidden[row : row + 1].clone(), weight, _rows(draw, row), one, alone)
        pairs.append(
            (
                torch.stack((own[0].double(), own[1].double())),
                torch.stack((tokens[row : row + 1].double(), logprobs[row : row + 1].double())),
            )
        )
    check_same(report, f"{title}: a row alone = in a batch of {rows}", [p[0] for p in pairs], [p[1] for p in pairs])
    check_launches(setting, report, title, head, max(2, setting.suite.check_repeats // 10))
    written, _ = sampling.sample_logits(logits, draw, live, sampling.Workspace.allocate(rows, vocab_size, device))
    check_same(report, f"{title}: from written logits", [written], [tokens])
    _truncated(setting, report, title, logits, draw, tokens)


def _exact_logits(hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, V] float64, and what float32 sums may be off by; a part of the vocabulary at a time."""
    exact, spreads = [], []
    for first in range(0, len(weight), VOCABULARY_AT_ONCE):
        own = weight[first : first + VOCABULARY_AT_ONCE].double()
        exact.append(hidden.double() @ own.t())
        spreads.append(product_spread(hidden.double(), own, torch.float32))
    return torch.cat(exact, 1), torch.cat(spreads, 1)


def _noise(draw: DrawInputs, row: int, vocab_size: int) -> torch.Tensor:
    if not float(draw.temperature[row]):
        return torch.zeros(vocab_size)
    own = (int(draw.seed[row]), int(draw.sample_index[row]), int(draw.position[row]))
    return torch.from_numpy(reference_sampling.gumbel(*own, vocab_size))


def _truncated(
    setting: Setting, report: Report, title: str, logits: torch.Tensor, draw: DrawInputs, tokens: torch.Tensor
) -> None:
    """Rows that keep all, that cut by one rule, and that cut by all three."""
    rows, vocab_size = logits.shape
    device = logits.device
    rules = [
        (0, 1.0, 0.0),
        (vocab_size, 1.0, 0.0),
        (50, 1.0, 0.0),
        (0, 0.9, 0.0),
        (0, 1.0, 0.05),
        (200, 0.7, 0.01),
        (1, 1.0, 0.0),
    ]
    chosen = [rules[row % len(rules)] for row in range(rows)]
    truncate = TruncationInputs(
        active=torch.tensor([row % 5 != 4 for row in range(rows)], dtype=torch.int32, device=device),
        top_k=torch.tensor([rule[0] for rule in chosen], dtype=torch.int32, device=device),
        top_p=torch.tensor([rule[1] for rule in chosen], device=device),
        min_p=torch.tensor([rule[2] for rule in chosen], device=device),
    )
    live = torch.tensor([rows], dtype=torch.int32, device=device)
    workspace = sampling.Workspace.allocate(rows, vocab_size, device)
    search = truncation.TruncationWorkspace.allocate(rows, vocab_size, device)

    def call(pdl: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        # Rows that are not drawn anew keep what is there.
        workspace.tokens.copy_(tokens)
        workspace.logprobs.zero_()
        return truncation.sample_truncated(logits, draw, truncate, live, workspace, search, pdl=pdl)

    drawn = call()[0].clone()
    checked = [row for row in range(rows) if row % 5 != 4][:16]
    at = torch.tensor(checked, device=device)
    fields = (truncate.active, truncate.top_k, truncate.top_p, truncate.min_p)
    draws = (draw.temperature, draw.seed, draw.sample_index, draw.position, draw.wants_logits)
    wanted, _ = reference_sampling.sample(
        logits[at].cpu(),
        DrawInputs(*(field[at].cpu() for field in draws)),
        TruncationInputs(*(field[at].cpu() for field in fields)),
    )
    different = int((drawn[at].cpu() != wanted).sum())
    report.check(
        f"{title}: truncated rows draw what a sort leaves", different == 0, different=different, rows=len(checked)
    )
    keeps_all = [rule[0] in (0, vocab_size) and rule[1:] == (1.0, 0.0) for rule in chosen]
    untouched = [row for row in range(rows) if row % 5 == 4 or keeps_all[row]]
    kept = torch.tensor(untouched, device=device)
    check_same(report, f"{title}: rows that cut nothing keep their token", [drawn[kept]], [tokens[kept]])
    check_launches(setting, report, f"{title}, truncated", call, max(2, setting.suite.check_repeats // 20))


def _decode_step(setting: Setting, report: Report, dtype: torch.dtype, name: str) -> None:
    suite = setting.suite
    config = replace(
        suite.config, num_hidden_layers=suite.check_layers, vocab_size=min(suite.config.vocab_size, 1 << 14)
    )
    longest = config.max_position_embeddings - CHAIN_STEPS - 1
    lengths = [min(length, longest) for length in check_lengths(setting)]
    blocks = sum(-(-(length + 8) // suite.block_size) for length in lengths)
    machine = Machine.build(
        setting,
        config,
        dtype,
        max_num_seqs=suite.check_batch,
        max_model_len=max(lengths) + CHAIN_STEPS,
        num_blocks=blocks,
    )
    plant_zeros(machine.model, 0.9)
    tables = machine.tables([length + CHAIN_STEPS for length in lengths])
    dice = random.Random(setting.seed)
    tokens = [dice.randrange(config.vocab_size) for _ in lengths]
    batch = decode_batch(lengths, tables, tokens)
    title, before = f"decode step, {name}", _cache_copy(machine.cache)

    with seen_zeros() as seen:
        hidden = _hidden(machine, batch)
    report.note(f"{title}: zero activations seen {seen.zeros:.3f}")
    after = _cache_copy(machine.cache)
    exact = _float32_hidden(setting, machine, dtype, before, batch)
    relative = ((hidden.double() - exact.double()).norm() / exact.double().norm()).item()
    report.check(f"{title}: near float32", relative <= STEP_ERROR[dtype], relative_error=relative)
    for size in sorted({1, min(16, len(batch)), min(17, len(batch))}):
        own = _hidden(machine, batch[-size:])
        check_same(report, f"{title}: rows in a batch of {size} = of {len(batch)}", [own], [hidden[-size:]])
    with skipping(machine.kernels, 0):
        small = batch[: min(8, len(batch))]
        dense = _hidden(machine, small)
    check_same(report, f"{title}: skipping = dense", [_hidden(machine, small)], [dense])
    check_same(report, f"{title}: the cache holds the same", _keys(machine.cache), _keys(after))
    for dependent in (False, True) if supports_pdl(setting.device) else (False,):
        launched = f"{title}, dependent launch {dependent}"
        machine.kernels.pdl = dependent
        check_same(report, f"{launched}: as the first time", [_hidden(machine, batch)], [hidden])
        repeats = max(2, suite.check_repeats // 10)
        check_repeats(report, f"{launched}: the same bits every time", lambda: [_hidden(machine, batch)], repeats)
        _graph_steps(report, launched, machine, before, batch)


def _hidden(machine: Machine, batch: Sequence[SequenceInput]) -> torch.Tensor:
    """The final hidden states of a decode step, run eagerly."""
    return _forward(machine.model, machine.cache, machine.kernels, batch)


def _forward(
    model: Persimmon, cache: KVCache, kernels: Kernels[Any, Any], batch: Sequence[SequenceInput]
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
    return model.forward(Step(tokens, plan, None), cache)


def _cache_copy(cache: KVCache) -> KVCache:
    return KVCache([LayerCache(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])


def _keys(cache: KVCache) -> list[torch.Tensor]:
    return [layer.keys for layer in cache.layers]


def _float32_hidden(
    setting: Setting,
    machine: Machine,
    dtype: torch.dtype,
    before: KVCache,
    batch: Sequence[SequenceInput],
) -> torch.Tensor:
    """The same step in plain torch and float32, from the same weights and cache."""
    model = random_model(setting, machine.model.config, torch.float32, reference, stored=dtype)
    plant_zeros(model, 0.9)
    cache = KVCache([LayerCache(layer.keys.float(), layer.values.float()) for layer in before.layers])
    return _forward(model, cache, reference, batch)


def _graph_steps(report: Report, title: str, machine: Machine, before: KVCache, batch: Sequence[SequenceInput]) -> None:
    """Captured steps on padded buffers against eager and plain ones, tokens and cache; then steps that feed others."""
    cached = machine.cache.tensors
    hot = [
        replace(item, samplings=(RowSampling(asked=SamplingParams(temperature=0.8, seed=row)),))
        for row, item in enumerate(batch)
    ]
    sizes = sorted({1, min(4, len(batch)), len(batch)})
    graphs = machine.graphs(sizes)
    machine.kernels.pdl = False
    for size in sorted({max(1, size - 1) for size in sizes}):
        part = hot[:size]
        outcomes = []
        for steps in (graphs, None):
            _restore(machine.cache, before)
            drawn = torch.tensor(machine.runner(steps).run(part))
            outcomes.append([drawn, *(layer.clone() for layer in cached)])
        check_same(report, f"{title}: {size} padded and captured = eager", *outcomes)
    chains = []
    for waits in (False, True):
        _restore(machine.cache, before)
        chains.append(_chain(machine, graphs, hot, waits=waits))
    check_same(report, f"{title}: placeholders = fetched tokens", [chains[0]], [chains[1]])


def _chain(machine: Machine, graphs: DecodeGraphs, batch: Sequence[SequenceInput], *, waits: bool) -> torch.Tensor:
    """[CHAIN_STEPS, R] tokens of steps that are fed by the one before: on the device, or through the host."""
    runner = machine.runner(graphs)
    pending = []
    fed: Sequence[int] = [item.token_ids[0] for item in batch]
    for step in range(CHAIN_STEPS):
        moved = [
            SequenceInput(
                [token], item.start + step, item.block_table, [replace(own, position=step) for own in item.samplings]
            )
            for token, item in zip(fed, batch, strict=True)
        ]
        pending.append(runner.launch(moved))
        fed = [token for (token,) in pending[-1].wait().tokens] if waits else [-1 - row for row in range(len(batch))]
    return torch.tensor([[token for (token,) in step.wait().tokens] for step in pending])


def _restore(cache: KVCache, saved: KVCache) -> None:
    for tensor, own in zip(cache.tensors, saved.tensors, strict=True):
        tensor.copy_(own)
