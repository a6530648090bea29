"""Checks draws by the head and from written logits, whole and truncated, against exact logits and plain torch."""

import random
from collections.abc import Sequence

import torch

from benchmarks.gpu.compare import check_launches, check_same, product_spread
from benchmarks.gpu.inputs import normal
from benchmarks.gpu.report import Report
from benchmarks.gpu.suite import Setting
from persimmon.kernels import reference_sampling, sampling, truncation
from persimmon.kernels.head import sample_head
from persimmon.kernels.operands import DrawInputs, TruncationInputs

VOCABULARY_AT_ONCE = 1 << 15


def _draw_inputs(rows: int, device: torch.device, dice: random.Random) -> DrawInputs:
    """Greedy, cool, plain and hot rows in turn, with 63-bit seeds."""

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


def check_sampling(setting: Setting, report: Report, dtype: torch.dtype, name: str) -> None:
    config, generator, device = setting.suite.config, setting.generator(), setting.device
    rows, vocab_size, title = setting.suite.check_batch, setting.suite.config.vocab_size, f"sampling, {name}"
    weight = normal(generator, vocab_size, config.hidden_size, dtype=dtype, deviation=0.03)
    hidden = normal(generator, rows, config.hidden_size, dtype=dtype)
    draw = _draw_inputs(rows, device, random.Random(setting.seed))
    live = torch.tensor([rows], dtype=torch.int32, device=device)
    workspace = sampling.Workspace.allocate(rows, vocab_size, device)
    logits = torch.full((rows, vocab_size), float("nan"), dtype=torch.float32, device=device)

    def head(pdl: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        return sample_head(hidden, weight, draw, live, workspace, logits=logits, pdl=pdl)

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
        own = sample_head(hidden[row : row + 1].clone(), weight, _rows(draw, row), one, alone)
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
    """[R, V] float64, and the error allowed to float32 sums; a part of the vocabulary at a time."""
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
