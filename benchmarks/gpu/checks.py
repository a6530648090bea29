"""Are the kernels right?  Each against exact arithmetic on fresh random inputs, and bit for bit against itself.

Bit for bit: alone or among others, with work in any order, run after run, captured or not, with and without
programmatic dependent launch.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks.gpu.checks_attention import check_decode_attention, check_prompt_attention
from benchmarks.gpu.checks_requests import check_changed_logits
from benchmarks.gpu.checks_sampling import check_sampling
from benchmarks.gpu.compare import (
    FLOAT32_UNIT,
    check_launches,
    check_same,
    compare,
    product_spread,
    rounded,
    type_name,
)
from benchmarks.gpu.inputs import (
    Width,
    normal,
    planted_activation,
    row_statistics,
    widths,
)
from benchmarks.gpu.report import Report
from benchmarks.gpu.suite import Setting
from persimmon.kernels.layer_norm import bias_relu_squared_, embed, layer_norm
from persimmon.kernels.projection import project, project_add_
from persimmon.kernels.projection_config import ATTENTION_OUT, MLP_DOWN, WIDE, Norm, Workspace


def run(setting: Setting, report: Report) -> None:
    """In float16; what the smoke section has not covered comes first."""
    report.note(f"seed {setting.seed}")
    check_types(setting, report, (torch.float16,))


def check_types(setting: Setting, report: Report, dtypes: Sequence[torch.dtype]) -> None:
    """The checks of single kernels; bit for bit only in float16."""
    for dtype in dtypes:
        name = type_name(dtype)
        checks = {
            "prompt attention": partial(check_prompt_attention, setting, report, dtype, name),
            "projections": partial(_projections, setting, report, dtype, name),
            "elementwise": partial(_elementwise, setting, report, dtype, name),
        }
        if dtype.itemsize == 2:
            checks["sampling"] = partial(check_sampling, setting, report, dtype, name)
            checks["changed logits"] = partial(check_changed_logits, setting, report, dtype, name)
        for what, call in checks.items():
            report.attempt(f"{what}, {name}", call, seconds=6)
        for block_size in setting.suite.check_block_sizes if dtype == torch.float16 else (setting.suite.block_size,):
            title = f"{name}, blocks of {block_size}"
            report.attempt(
                f"decode attention, {title}",
                partial(check_decode_attention, setting, report, dtype, title, block_size),
                seconds=6,
            )


def _elementwise(setting: Setting, report: Report, dtype: torch.dtype, name: str) -> None:
    config, generator = setting.suite.config, setting.generator()
    hidden, rows = config.hidden_size, 3 * setting.suite.check_batch
    table = normal(generator, config.vocab_size, hidden, dtype=dtype)
    ids = torch.randint(len(table), (rows,), device=setting.device, generator=generator)
    sampled = torch.randint(len(table), (rows,), device=setting.device, generator=generator)
    by_place = torch.where(torch.arange(rows, device=setting.device) % 2 == 0, ids, -1 - ids % rows)
    values, statistics = embed(by_place, sampled, table)
    expected = table[torch.where(by_place >= 0, by_place, sampled[(-1 - by_place).clamp_min(0)])]
    check_same(report, f"embed, {name}: the table's rows", [values], [expected])

    weight = normal(generator, hidden, dtype=torch.float32, mean=1.0, deviation=0.1)
    bias = normal(generator, hidden, dtype=torch.float32, deviation=0.1)
    x = values * 3 + 1
    pending = normal(generator, rows, hidden, dtype=dtype)
    summed = x.clone()
    normed = layer_norm(summed, None, weight, bias, 1e-5, residual=pending)
    total = (x.double() + pending.double()).to(dtype)
    check_same(report, f"LayerNorm of prompts, {name}: the sum", [summed], [total])
    for title, given, out in (
        ("LayerNorm of prompts", total, normed),
        ("LayerNorm from statistics", values, layer_norm(values, statistics, weight, bias, 1e-5)),
    ):
        exact = F.layer_norm(given.double(), (hidden,), weight.double(), bias.double(), 1e-5)
        compare(report, f"{title}, {name}", out, exact, rounded(exact, dtype, 64 * FLOAT32_UNIT))
    wide = normal(generator, rows, config.intermediate_size, dtype=dtype, deviation=2.0)
    exact = wide.double().relu().square()
    compare(
        report,
        f"squared ReLU, {name}",
        bias_relu_squared_(wide.clone(), None),
        exact,
        rounded(exact, dtype, exact * 4 * FLOAT32_UNIT),
    )
    saturated = bias_relu_squared_(wide * 0 + 300, None).float()
    most = min(90_000.0, torch.finfo(dtype).max)
    report.check(f"squared ReLU, {name}: of 300 stays finite", bool(((saturated - most).abs() <= 0.01 * most).all()))


def _projections(setting: Setting, report: Report, dtype: torch.dtype, name: str) -> None:
    generator, suite = setting.generator(), setting.suite
    bit_for_bit = dtype == torch.float16
    counts = suite.check_rows if bit_for_bit else suite.check_rows[1:2]
    for width in widths(suite.config):
        check = _ProjectionCheck(setting=setting, width=width, dtype=dtype, generator=generator, most=max(counts))
        for rows in counts:
            check.against_exact(report, f"{width.name}, {name}, {rows} rows", rows)
        if bit_for_bit:
            check.row_by_row(report, f"{width.name}, {name}")
            check_launches(setting, report, f"{width.name}, {name}, {max(counts)} rows", check.run_all)


class _ProjectionCheck:
    """One projection of the layer with its inputs."""

    def __init__(
        self, setting: Setting, width: Width, dtype: torch.dtype, generator: torch.Generator, most: int
    ) -> None:
        self.dtype, self.width = dtype, width
        self._into_residual = width.out_features == setting.suite.config.hidden_size
        self._is_down = width.name == "mlp_down"
        self.weight = normal(generator, width.out_features, width.in_features, dtype=dtype, deviation=0.02)
        self._stored = self.weight.t().contiguous() if self._is_down else self.weight
        self.bias = normal(generator, width.out_features, dtype=dtype, deviation=0.02)
        self.gamma = normal(generator, width.in_features, dtype=torch.float32, mean=1.0, deviation=0.1)
        self.beta = normal(generator, width.in_features, dtype=torch.float32, deviation=0.1)
        x = normal(generator, most, width.in_features, dtype=dtype, mean=0.3)
        if self._is_down:
            x = planted_activation(generator, most, width.in_features, 0.9, shared=False, dtype=dtype)
        self.x, self._statistics = x, row_statistics(x)
        self.residual = normal(generator, most, width.out_features, dtype=dtype)
        self.live = torch.tensor([most], dtype=torch.int32, device=setting.device)
        self.config = {"attention_out": ATTENTION_OUT, "mlp_down": MLP_DOWN}.get(width.name, WIDE)
        self.workspace = Workspace.allocate([(width.out_features, self.config)], most, setting.device)

    def run(self, rows: int, *, pdl: bool = False, masked: bool = True, first: int = 0) -> tuple[torch.Tensor, ...]:
        """The kernel on these rows: the result, and statistics or flags."""
        given = self.x[first : first + rows].contiguous()
        if self._into_residual:
            out = self.residual[first : first + rows].clone()
            alive = (given != 0).any(0).to(torch.int8) if self._is_down and masked else None
            statistics = project_add_(
                out,
                given,
                self._stored,
                self.bias,
                transposed=self._is_down,
                alive=alive,
                live=self.live,
                workspace=self.workspace,
                config=self.config,
                pdl=pdl,
            )
            return out, statistics
        own = self._statistics[:, :, first : first + rows].contiguous()
        norm = Norm(statistics=own, weight=self.gamma, bias=self.beta, eps=1e-5)
        out, flags = project(
            given,
            self._stored,
            self.bias,
            norm=norm,
            live=self.live,
            workspace=self.workspace,
            config=self.config,
            activation="relu_squared" if self.width.name == "mlp_up" else "none",
            pdl=pdl,
        )
        return (out,) if flags is None else (out, flags)

    def run_all(self, pdl: bool) -> Sequence[torch.Tensor]:
        """All rows."""
        return self.run(len(self.x), pdl=pdl)

    def against_exact(self, report: Report, name: str, rows: int) -> None:
        given, weight = self.x[:rows].double(), self.weight.double()
        out, *others = self.run(rows)
        if not self._into_residual:
            normed = F.layer_norm(given, given.shape[1:], self.gamma.double(), self.beta.double(), 1e-5)
            given = normed.to(self.dtype).double()
        exact, spread = given @ weight.t() + self.bias.double(), product_spread(given, weight, self.dtype)
        if self._into_residual:
            exact += self.residual[:rows].double()
        if self.width.name == "mlp_up":
            positive = exact.relu()
            exact, spread = positive.square(), 2 * positive * spread + spread.square()
        compare(report, name, out, exact, rounded(exact, self.dtype, spread))
        if self._into_residual:
            tiles = out.double().view(len(out), -1, 64)
            exact = torch.stack((tiles.mean(2), tiles.var(2, correction=0) * 64)).transpose(1, 2)
            compare(report, f"{name}: statistics", others[0], exact, 1e-5 * (1 + exact.abs()))
        elif others:
            check_same(report, f"{name}: flags", others, [(out != 0).any(0).to(torch.int8)])
        if self._is_down:
            check_same(report, f"{name}: masked = dense", self.run(rows), self.run(rows, masked=False))

    def row_by_row(self, report: Report, name: str) -> None:
        most = len(self.x)
        together, single = self.run(most)[0], [self.run(1, first=row)[0] for row in _some(most)]
        check_same(
            report, f"{name}: a row alone = in a batch of {most}", single, [together[r : r + 1] for r in _some(most)]
        )


def _some(rows: int) -> list[int]:
    """A few rows of a batch, the first and the last among them."""
    return sorted({0, rows // 3, rows // 2, rows - 1})
