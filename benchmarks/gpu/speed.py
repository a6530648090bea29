"""How fast is each kernel?  Bytes, microseconds and the share of what the card can do.

Weights and caches take turns over more memory than any cache holds, as they do when the layers of a step follow each
other; cuBLAS and torch's attention are listed next to the kernels they compare with.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks.gpu.ceilings import COPY, MATMUL
from benchmarks.gpu.inputs import (
    AttentionInputs,
    Pages,
    Width,
    make_attention_inputs,
    make_pages,
    normal,
    planted_activation,
    widths,
)
from benchmarks.gpu.report import Report
from benchmarks.gpu.suite import Setting
from benchmarks.gpu.timing import Call, Timing, rotate, rotations, time_variants
from persimmon.kernels import sampling, truncation
from persimmon.kernels.chunk_plan import plan_chunks
from persimmon.kernels.decode_attention import DecodeConfig, DecodeWorkspace, build_work_list, decode_attention
from persimmon.kernels.fused import SMALL_STEP
from persimmon.kernels.layer_norm import bias_relu_squared_, embed, layer_norm
from persimmon.kernels.operands import DrawInputs, TruncationInputs
from persimmon.kernels.prefill_attention import prefill_attention, qk_norm_rotary_store
from persimmon.kernels.projection import project, project_add_
from persimmon.kernels.projection_config import ATTENTION_OUT, MLP_DOWN, WIDE, Norm, ProjectionConfig, Workspace

DTYPE = torch.float16
DECODE_SHARE = "decode attention at 64 x 512, share of the copy rate"


def run(setting: Setting, report: Report) -> None:
    """Each kernel by itself."""
    ceiling = report.figures().get(COPY)
    with report.attempt("decode attention"):
        _decode_attention(setting, report, ceiling)
    for width in widths(setting.suite.config):
        with report.attempt(width.name):
            _projection(setting, report, ceiling, width)
    with report.attempt("skipped rows"):
        _skipped_rows(setting, report, ceiling)
    with report.attempt("prompt attention"):
        _prompt_attention(setting, report)
    with report.attempt("elementwise"):
        _elementwise(setting, report, ceiling)
    with report.attempt("sampling"):
        _sampling(setting, report, ceiling)


def memory_columns(timing: Timing, moved: int, ceiling: float | None) -> dict[str, object]:
    """Columns of a row about a kernel that waits for memory."""
    rate = moved / timing.seconds
    return {**timing.columns, "mb": moved / 1e6, "gb_s": rate / 1e9, "of_copy": rate / ceiling if ceiling else None}


class DecodeCase:
    """Decode attention of one batch, by turns over several sets of sequences."""

    def __init__(self, setting: Setting, batch: int, context: int, block_size: int) -> None:
        suite, config, generator = setting.suite, setting.suite.config, setting.generator()
        heads, dim, size = config.num_attention_heads, config.head_dim, DTYPE.itemsize
        per_sequence = heads * dim * size * (2 * (context - 1) + 3 + 3)
        self.moved = batch * per_sequence
        sets = rotations(self.moved, suite.rotated_bytes)
        self.inputs: AttentionInputs = make_attention_inputs(config, batch, DTYPE, generator)
        self.pages: Pages = make_pages(config, [context] * batch * sets, block_size, DTYPE, generator)
        self.lengths = torch.full((batch,), context, dtype=torch.int32, device=setting.device)
        self.tables = [self.pages.table_tensor(range(first, first + batch)) for first in range(0, batch * sets, batch)]
        self.workspace = DecodeWorkspace.allocate(batch, context, heads, dim, setting.device)
        build_work_list(self.lengths, self.workspace)

    def calls(self, config: DecodeConfig) -> list[Call]:
        """One call for each set."""
        inputs = self.inputs
        return [
            partial(
                decode_attention,
                inputs.qkv,
                inputs.norm_weight,
                inputs.norm_bias,
                inputs.eps,
                inputs.rotary.cos,
                inputs.rotary.sin,
                self.pages.cache,
                self.lengths,
                tables,
                self.workspace,
                config=config,
            )
            for tables in self.tables
        ]

    def dense_calls(self, batch: int, context: int) -> list[Call]:
        """Attention of torch over keys and values that lie side by side: no pages, no norms, no cache write."""
        _, heads, _, dim = self.inputs.qkv.shape
        shape = (-1, batch, heads, context, dim)
        count = batch * heads * context * dim
        sets = self.pages.keys.numel() // count
        keys, values = (cache.view(-1)[: sets * count].view(shape) for cache in (self.pages.keys, self.pages.values))
        q = self.inputs.qkv[:, :, :1].clone()
        return [
            partial(F.scaled_dot_product_attention, q, own_keys, own_values)
            for own_keys, own_values in zip(keys, values, strict=True)
        ]


def _decode_attention(setting: Setting, report: Report, ceiling: float | None) -> None:
    suite = setting.suite
    for batch, context in suite.decode_grid:
        with report.attempt(f"decode attention, {batch} x {context}"):
            case = DecodeCase(setting, batch, context, suite.block_size)
            timed = time_variants(
                {"ours": case.calls(DecodeConfig()), "torch": case.dense_calls(batch, context)},
                setting.device,
                suite.seconds_per_figure,
            )
            columns = memory_columns(timed["ours"], case.moved, ceiling)
            report.row(
                "decode attention", batch=batch, context=context, **columns, dense_torch_us=timed["torch"].median
            )
            if (batch, context) == (64, 512) and ceiling:
                report.figure(DECODE_SHARE, case.moved / timed["ours"].seconds / ceiling)
    batch, context = suite.decode_grid[-1]
    case = DecodeCase(setting, batch, context, suite.block_size)
    work_list = {"work list": [partial(build_work_list, case.lengths, case.workspace)]}
    timed = time_variants(work_list, setting.device, suite.seconds_per_figure)
    report.row("work list", batch=batch, context=context, **timed["work list"].columns)


class ProjectionCase:
    """One projection with a number of rows, by turns over several weights."""

    def __init__(self, setting: Setting, width: Width, rows: int, *, zeros: float = 0.5, shared: bool = False) -> None:
        generator, self.width, self.rows = setting.generator(), width, rows
        self.is_down = width.name == "mlp_down"
        self.adds = width.out_features == setting.suite.config.hidden_size
        self.weight_bytes = width.in_features * width.out_features * DTYPE.itemsize

        def weight() -> torch.Tensor:
            shape = (width.in_features, width.out_features)
            return normal(generator, *(shape if self.is_down else shape[::-1]), dtype=DTYPE, deviation=0.02)

        self.bias = normal(generator, width.out_features, dtype=DTYPE)
        self.x = normal(generator, rows, width.in_features, dtype=DTYPE)
        if self.is_down:
            self.x = planted_activation(generator, rows, width.in_features, zeros, shared=shared, dtype=DTYPE)
        self.alive = (self.x != 0).any(0).to(torch.int8)
        # Rows that are not read do not evict the cache.
        read = round(self.weight_bytes * (self.alive.float().mean().item() if self.is_down else 1.0))
        self.weights = rotate(weight, read, setting.suite.rotated_bytes)
        self.out = normal(generator, rows, width.out_features, dtype=DTYPE)
        self.live = torch.tensor([rows], dtype=torch.int32, device=setting.device)
        self._statistics = embed(torch.arange(rows, device=setting.device), None, self.x)[1]
        self._gamma, self._beta = torch.ones_like(self.x[0]).float(), torch.zeros_like(self.x[0]).float()

    @property
    def moved(self) -> int:
        """Bytes of a dense call: the weight, what comes in, what goes out (and was there before, where it adds)."""
        out = self.out.nbytes * (2 if self.adds else 1)
        return self.weight_bytes + self.x.nbytes + out + self.bias.nbytes

    @property
    def moved_when_skipping(self) -> int:
        """Bytes where rows of the weight that meet only zeros are not read."""
        unread = 1 - self.alive.float().mean().item()
        return self.moved - round(unread * self.weight_bytes)

    @property
    def default(self) -> ProjectionConfig:
        """How the network launches it."""
        own = {"attention_out": ATTENTION_OUT, "mlp_down": MLP_DOWN}
        return own.get(self.width.name, WIDE)

    def calls(self, config: ProjectionConfig, *, skipping: bool = False) -> list[Call]:
        """One call for each weight, of what the network calls."""
        workspace = Workspace.allocate([(self.width.out_features, config)], self.rows, self.x.device)
        alive = self.alive if skipping else None
        norm = Norm(self._statistics, self._gamma, self._beta, 1e-5)
        if self.adds:
            return [
                partial(
                    project_add_,
                    self.out,
                    self.x,
                    weight,
                    self.bias,
                    transposed=self.is_down,
                    alive=alive,
                    live=self.live,
                    workspace=workspace,
                    config=config,
                )
                for weight in self.weights
            ]
        return [
            partial(
                project,
                self.x,
                weight,
                self.bias,
                norm=norm,
                live=self.live,
                workspace=workspace,
                config=config,
                activation="relu_squared" if self.width.name == "mlp_up" else "none",
            )
            for weight in self.weights
        ]

    def cublas_calls(self) -> list[Call]:
        """Only the matrix product with its bias: no norm, activation or residual."""
        return [partial(F.linear, self.x, weight.t() if self.is_down else weight, self.bias) for weight in self.weights]


def _projection(setting: Setting, report: Report, ceiling: float | None, width: Width) -> None:
    for rows in setting.suite.rows:
        with report.attempt(f"{width.name}, {rows} rows"):
            case = ProjectionCase(setting, width, rows)
            timed = time_variants(
                {"ours": case.calls(case.default), "cuBLAS": case.cublas_calls()},
                setting.device,
                setting.suite.seconds_per_figure,
            )
            columns = memory_columns(timed["ours"], case.moved, ceiling)
            report.row("projections", name=width.name, rows=rows, **columns, cublas_us=timed["cuBLAS"].median)


def _skipped_rows(setting: Setting, report: Report, ceiling: float | None) -> None:
    down = next(width for width in widths(setting.suite.config) if width.name == "mlp_down")
    for rows in [rows for rows in setting.suite.rows if rows <= 16]:
        for shared in (False, True) if rows > 1 else (True,):
            for zeros in setting.suite.zero_fractions:
                with report.attempt(f"skipped rows, {rows} rows, {zeros}"):
                    case = ProjectionCase(setting, down, rows, zeros=zeros, shared=shared)
                    timed = time_variants(
                        {"skipping": case.calls(case.default, skipping=True), "dense": case.calls(case.default)},
                        setting.device,
                        setting.suite.seconds_per_figure / 2,
                    )
                    columns = memory_columns(timed["skipping"], case.moved_when_skipping, ceiling)
                    report.row(
                        "skipped rows",
                        rows=rows,
                        zeros=zeros,
                        places="shared" if shared else "independent",
                        unread=1 - case.alive.float().mean().item(),
                        **columns,
                        dense_us=timed["dense"].median,
                    )


def prompt_attention_flops(setting: Setting, start: int, count: int) -> int:
    """Of one layer: two products over the keys that each query sees."""
    return 4 * setting.suite.config.hidden_size * (count * start + count * (count + 1) // 2)


def _prompt_attention(setting: Setting, report: Report) -> None:
    suite, config, ceiling = setting.suite, setting.suite.config, report.figures().get(MATMUL)
    for start, count in suite.chunk_grid:
        with report.attempt(f"prompt attention, {count} after {start}"):
            generator = setting.generator()
            inputs = make_attention_inputs(config, count, DTYPE, generator)
            pages = make_pages(config, [start + count], suite.block_size, DTYPE, generator)
            plan = plan_chunks(pages.tables, [start], [count], block_size=suite.block_size, device=setting.device)
            q = inputs.qkv[:, :, 0].clone()
            dense_q, dense_k, dense_v = (inputs.qkv[:, :, which].transpose(0, 1)[None].clone() for which in range(3))
            variants: dict[str, Sequence[Call]] = {
                "ours": [partial(prefill_attention, q, pages.cache, plan)],
                "store": [
                    partial(
                        qk_norm_rotary_store,
                        inputs.qkv,
                        inputs.norm_weight,
                        inputs.norm_bias,
                        inputs.eps,
                        inputs.rotary.cos,
                        inputs.rotary.sin,
                        pages.cache,
                        plan,
                    )
                ],
            }
            if start == 0:
                variants["torch"] = [partial(F.scaled_dot_product_attention, dense_q, dense_k, dense_v, is_causal=True)]
            timed = time_variants(variants, setting.device, suite.seconds_per_figure)
            flops = prompt_attention_flops(setting, start, count)
            rate = flops / timed["ours"].seconds
            report.row(
                "prompt attention",
                context=start,
                tokens=count,
                **timed["ours"].columns,
                tflop_s=rate / 1e12,
                of_matmul=rate / ceiling if ceiling else None,
                store_us=timed["store"].median,
                dense_torch_us=timed["torch"].median if "torch" in timed else None,
            )


def _elementwise(setting: Setting, report: Report, ceiling: float | None) -> None:
    """The prompt path's passes over activations, and the decode path's first kernel."""
    suite, config, generator, rows = setting.suite, setting.suite.config, setting.generator(), setting.suite.chunk
    hidden, intermediate = config.hidden_size, config.intermediate_size
    size = rows * hidden * DTYPE.itemsize
    most = suite.rotated_bytes
    x = rotate(lambda: normal(generator, rows, hidden, dtype=DTYPE), size, most)
    wide = rotate(lambda: normal(generator, rows, intermediate, dtype=DTYPE), rows * intermediate * 2, most)
    table = normal(generator, config.vocab_size, hidden, dtype=DTYPE)
    ids = torch.randint(config.vocab_size, (rows,), device=setting.device, generator=generator)
    ones, zeros = torch.ones(hidden, device=setting.device), torch.zeros(hidden, device=setting.device)
    norm = partial(layer_norm, statistics=None, weight=ones, bias=zeros, eps=1e-5)
    calls: dict[str, tuple[list[Call], int]] = {
        "LayerNorm": ([partial(norm, own) for own in x], 2 * size),
        "LayerNorm + residual": ([partial(norm, own, residual=x[i - 1]) for i, own in enumerate(x)], 4 * size),
        "squared ReLU": ([partial(bias_relu_squared_, own, None) for own in wide], 2 * wide[0].nbytes),
        "embedding": ([partial(embed, ids, None, table)], 2 * size),
    }
    timed = time_variants({name: own for name, (own, _) in calls.items()}, setting.device, suite.seconds_per_figure)
    for name, timing in timed.items():
        report.row("elementwise", what=name, rows=rows, **memory_columns(timing, calls[name][1], ceiling))


def _sampling(setting: Setting, report: Report, ceiling: float | None) -> None:
    """The output projection with and without its draw, and draws from existing logits."""
    config, generator, device = setting.suite.config, setting.generator(), setting.device
    vocab_size = config.vocab_size
    weight = normal(generator, vocab_size, config.hidden_size, dtype=DTYPE, deviation=0.03)
    for rows in setting.suite.sample_rows:
        with report.attempt(f"sampling, {rows} rows"):
            hidden = normal(generator, rows, config.hidden_size, dtype=DTYPE)
            draw = DrawInputs(
                temperature=torch.ones(rows, device=device),
                seed=torch.arange(rows, device=device),
                sample_index=torch.zeros(rows, dtype=torch.int32, device=device),
                position=torch.zeros(rows, dtype=torch.int32, device=device),
                wants_logits=torch.zeros(rows, dtype=torch.int32, device=device),
            )
            greedy = replace(draw, temperature=torch.zeros(rows, device=device))
            truncate = TruncationInputs(
                active=torch.ones(rows, dtype=torch.int32, device=device),
                top_k=torch.full((rows,), 50, dtype=torch.int32, device=device),
                top_p=torch.full((rows,), 0.9, device=device),
                min_p=torch.zeros(rows, device=device),
            )
            live = torch.tensor([rows], dtype=torch.int32, device=device)
            workspace = sampling.Workspace.allocate(rows, vocab_size, device)
            search = truncation.TruncationWorkspace.allocate(rows, vocab_size, device)
            logits = torch.empty(rows, vocab_size, device=device)
            alone = partial(torch.mm, hidden, weight.t())
            from_logits = partial(sampling.sample_logits, logits, draw, live, workspace)
            variants: dict[str, Sequence[Call]] = {
                "projection alone": [alone],
                "draw from logits": [from_logits],
                "top-k 50, top-p 0.9": [
                    partial(truncation.sample_truncated, logits, draw, truncate, live, workspace, search)
                ],
            }
            if rows <= SMALL_STEP:
                for name, how in (("greedy", greedy), ("temperature", draw)):
                    fused = partial(sampling.sample_head, hidden, weight, how, live, workspace)
                    variants[f"projection and {name}"] = [fused]
            logits.copy_(alone())
            timed = time_variants(variants, device, setting.suite.seconds_per_figure)
            moved = {name: weight.nbytes for name in variants if "projection" in name} | {
                "draw from logits": logits.nbytes
            }
            for name, timing in timed.items():
                columns = memory_columns(timing, moved[name], ceiling) if name in moved else timing.columns
                report.row("sampling" if name in moved else "truncation", what=name, rows=rows, **columns)
