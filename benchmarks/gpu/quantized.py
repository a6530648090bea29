"""The kernels that read 8-bit and 4-bit weights: right first, then how fast, next to what memory allows.

Each projection in the formats of `--quantization`, lm_head in 8 bits, and dequantizing a matrix for larger steps.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks.gpu import predictions, targets
from benchmarks.gpu.compare import check_launches, check_same, compare, product_spread, rounded
from benchmarks.gpu.inputs import Width, normal, planted_activation, row_statistics, widths
from benchmarks.gpu.report import Report
from benchmarks.gpu.speed import memory_columns
from benchmarks.gpu.suite import Setting
from benchmarks.gpu.timing import Call, rotate, time_variants
from persimmon.kernels.dequantize import dequantize
from persimmon.kernels.fused import SPARSE_STEP
from persimmon.kernels.head import sample_head
from persimmon.kernels.launch import generation
from persimmon.kernels.operands import DrawInputs
from persimmon.kernels.packed_projection import BLOCK_ROWS, MAX_SPLITS, project, project_add_
from persimmon.kernels.packed_weight import PackedWeight, pack
from persimmon.kernels.projection_config import Norm, Workspace
from persimmon.kernels.quantized import Bits, QuantizedMatrix, pack_int4
from persimmon.kernels.sampling import Workspace as DrawWorkspace

DTYPE = torch.float16
FORMATS: dict[str, tuple[Bits, int | None]] = {
    "int8": (8, None),
    "int4, groups of 32": (4, 32),
    "int4, groups of 128": (4, 128),
}
"""Bits and inputs that share a scale."""

ZEROS = 0.9
"""Share of zero activations that the down projection meets."""


def run(setting: Setting, report: Report) -> None:
    """Checks of all formats, then times."""
    report.note(f"seed {setting.seed}")
    # In the interpreter nothing is measured; one format shows that the code runs.
    formats = list(FORMATS) if setting.on_gpu else ["int4, groups of 32"]
    inputs = [width.in_features for width in widths(setting.suite.config)]
    formats = [name for name in formats if not any(count % (FORMATS[name][1] or 1) for count in inputs)]
    for name in formats:
        for width in widths(setting.suite.config):
            report.attempt(f"{width.name}, {name}: right", partial(_check, setting, report, width, name), seconds=6)
    report.attempt("lm_head, int8", partial(_head, setting, report), seconds=6)
    for rows in setting.suite.rows:
        for name in formats:
            for width in widths(setting.suite.config):
                what = f"{width.name}, {name}, {rows} rows"
                report.attempt(what, partial(_time, setting, report, width, name, rows), seconds=4)
    for name in formats:
        report.attempt(f"dequantizing {name}", partial(_dequantize, setting, report, name), seconds=4)


def random_matrix(
    generator: torch.Generator, shape: tuple[int, int], bits: Bits, group_size: int | None
) -> QuantizedMatrix:
    """Numbers of the whole range, with scales that give products of normal inputs a deviation of about one half."""
    (rows, columns), most = shape, 1 << (bits - 1)
    integers = torch.randint(-most, most, shape, device=generator.device, generator=generator, dtype=torch.int8)
    groups = columns // (group_size or columns)
    scales = torch.rand(rows, groups, device=generator.device, generator=generator) + 0.5
    scales = (scales / (most * columns**0.5)).to(DTYPE)
    return QuantizedMatrix(
        numbers=integers if bits == 8 else pack_int4(integers),
        scales=scales,
        bits=bits,
        group_size=group_size or columns,
    )


class _Case:
    """One projection with its inputs and one or several quantized weights."""

    def __init__(self, setting: Setting, width: Width, name: str, rows: int) -> None:
        self.generator, self.width, self.rows, self._setting = setting.generator(), width, rows, setting
        self.is_down = width.name == "mlp_down"
        self.adds = width.out_features == setting.suite.config.hidden_size and width.name != "mlp_up"
        self._format = FORMATS[name]
        self.bias = normal(self.generator, width.out_features, dtype=DTYPE)
        self.x = normal(self.generator, rows, width.in_features, dtype=DTYPE)
        if self.is_down:
            self.x = planted_activation(self.generator, rows, width.in_features, ZEROS, shared=False, dtype=DTYPE)
        self.alive = (self.x != 0).any(0).to(torch.int8)
        self.residual = normal(self.generator, rows, width.out_features, dtype=DTYPE)
        self._gamma = normal(self.generator, width.in_features, dtype=torch.float32, mean=1.0, deviation=0.1)
        self._beta = normal(self.generator, width.in_features, dtype=torch.float32, deviation=0.1)
        self._statistics = row_statistics(self.x)
        partials = torch.empty(MAX_SPLITS * rows * width.out_features, dtype=torch.float32, device=self.x.device)
        counters = width.out_features // 64 * (rows // 32 + 1) + 1
        self._workspace = Workspace(partials, torch.zeros(counters, dtype=torch.int32, device=self.x.device))

    def matrix(self) -> QuantizedMatrix:
        """A random one of the format."""
        return random_matrix(self.generator, (self.width.out_features, self.width.in_features), *self._format)

    def pack(self, matrix: QuantizedMatrix) -> PackedWeight:
        """For the card."""
        return pack(matrix, columns=self.is_down, generation=generation(self._setting.device))

    @property
    def normed(self) -> torch.Tensor:
        """What the weight multiplies, in float64."""
        given = self.x.double()
        if not self.adds:
            given = F.layer_norm(given, given.shape[1:], self._gamma.double(), self._beta.double(), 1e-5)
        return given.to(DTYPE).double()

    def call(
        self, weight: PackedWeight, *, rows: slice = slice(None), masked: bool = True, pdl: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """The kernel on some rows: the result, and statistics or flags."""
        given, live = self.x[rows].contiguous(), None
        alive = self.alive if self.is_down and masked and self.rows <= SPARSE_STEP else None
        if self.adds:
            out = self.residual[rows].clone()
            more: Any = project_add_(
                out, given, weight, self.bias, alive=alive, live=live, workspace=self._workspace, pdl=pdl
            )
        else:
            own = self._statistics[:, :, rows].contiguous()
            norm = Norm(statistics=own, weight=self._gamma, bias=self._beta, eps=1e-5)
            activation: Any = "relu_squared" if self.width.name == "mlp_up" else "none"
            out, more = project(
                given,
                weight,
                self.bias,
                norm=norm,
                activation=activation,
                live=live,
                workspace=self._workspace,
                pdl=pdl,
            )
        return (out,) if more is None else (out, more)

    def launched(self, weight: PackedWeight, pdl: bool) -> tuple[torch.Tensor, ...]:
        """All rows, dependently or not."""
        return self.call(weight, pdl=pdl)


def _check(setting: Setting, report: Report, width: Width, name: str) -> None:
    for rows in setting.suite.check_rows:
        case = _Case(setting, width, name, rows)
        matrix = case.matrix()
        weight, title = case.pack(matrix), f"{width.name}, {name}, {rows} rows"
        out = case.call(weight)[0]
        given, dense = case.normed, matrix.dequantized().double()
        exact, spread = given @ dense.t() + case.bias.double(), product_spread(given, dense, DTYPE)
        if case.adds:
            exact += case.residual.double()
        if width.name == "mlp_up":
            positive = exact.relu()
            exact, spread = positive.square(), 2 * positive * spread + spread.square()
        compare(report, title, out, exact, rounded(exact, DTYPE, spread))
        if case.is_down:
            check_same(report, f"{title}: masked = dense", case.call(weight), case.call(weight, masked=False))
        if rows == max(setting.suite.check_rows):
            alone = case.call(weight, rows=slice(rows - 1, rows), masked=False)[0]
            check_same(report, f"{title}: a row alone = in the batch", [alone], [out[rows - 1 :]])
            check_launches(setting, report, title, partial(case.launched, weight))


def _time(setting: Setting, report: Report, width: Width, name: str, rows: int) -> None:
    case = _Case(setting, width, name, rows)
    first = case.pack(case.matrix())
    weights = rotate(lambda: case.pack(case.matrix()), first.nbytes, setting.suite.rotated_bytes)
    variants: dict[str, list[Call]] = {"dense": [partial(case.call, weight, masked=False) for weight in weights]}
    if case.is_down and rows <= SPARSE_STEP:
        variants["90% zeros"] = [partial(case.call, weight) for weight in weights]
    timed = time_variants(variants, setting.device, setting.suite.seconds_per_figure)
    for variant, timing in timed.items():
        launch = predictions.DOWN_AT_90_PERCENT_ZEROS if variant != "dense" else predictions.LAUNCHES[width.name]
        report.row(
            "quantized projections",
            name=width.name,
            weights=name,
            rows=rows,
            variant=variant,
            **memory_columns(timing, first.nbytes, report.figures().get(targets.COPY)),
            predicted_us=predictions.predicted_quantized_us(setting, name, rows, launch),
        )


def _head(setting: Setting, report: Report) -> None:
    suite, generator = setting.suite, setting.generator()
    config, rows = suite.config, min(BLOCK_ROWS, suite.check_batch)
    matrix = random_matrix(generator, (config.vocab_size, config.hidden_size), 8, None)
    head, hidden = (
        pack(matrix, generation=generation(setting.device)),
        normal(generator, rows, config.hidden_size, dtype=DTYPE),
    )

    def words(value: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device=setting.device)

    draw = DrawInputs(
        temperature=words(0, torch.float32),
        seed=words(1, torch.int64),
        sample_index=words(0, torch.int32),
        position=words(0, torch.int32),
        wants_logits=words(1, torch.int32),
    )
    logits = torch.empty(rows, config.vocab_size, device=setting.device)
    workspace = DrawWorkspace.allocate(rows, config.vocab_size, setting.device)
    live = torch.tensor([rows], dtype=torch.int32, device=setting.device)
    tokens, _ = sample_head(hidden, head, draw, live, workspace, logits=logits)
    given, dense = hidden.double(), matrix.dequantized().double()
    exact, spread = given @ dense.t(), product_spread(given, dense, DTYPE)
    compare(report, f"lm_head, int8, {rows} rows", logits, exact, rounded(exact, torch.float32, spread))
    check_same(report, "lm_head, int8: the highest logit wins", [tokens], [logits.argmax(1)])
    calls: list[Call] = [partial(sample_head, hidden, head, draw, live, workspace)]
    timed = time_variants({"int8": calls}, setting.device, suite.seconds_per_figure)
    columns = memory_columns(timed["int8"], head.nbytes, report.figures().get(targets.COPY))
    predicted = predictions.predicted_quantized_us(setting, "int8", rows, "lm_head")
    report.row("quantized lm_head", rows=rows, **columns, predicted_us=predicted)


def _dequantize(setting: Setting, report: Report, name: str) -> None:
    width = widths(setting.suite.config)[-1]
    case = _Case(setting, width, name, 1)
    matrix = case.matrix()
    weight = case.pack(matrix)
    buffer = torch.empty(width.in_features * width.out_features, dtype=DTYPE, device=setting.device)
    out = dequantize(weight, buffer, 0, width.out_features)
    check_same(report, f"dequantizing {name}, {width.name}", [out], [matrix.dequantized().to(DTYPE)])
    calls: list[Call] = [partial(dequantize, weight, buffer, 0, width.out_features)]
    timed = time_variants({name: calls}, setting.device, setting.suite.seconds_per_figure)
    columns = memory_columns(timed[name], weight.nbytes + out.nbytes, report.figures().get(targets.COPY))
    report.row("dequantizing", name=width.name, weights=name, **columns)
