"""How fast is each kernel?  Bytes, microseconds and the share of what the card can do.

Each kernel by itself; cuBLAS and torch's attention are listed next to the kernels that they are compared with.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks.gpu import predictions, targets
from benchmarks.gpu.cases import DTYPE, DecodeCase, ProjectionCase
from benchmarks.gpu.inputs import Width, make_attention_inputs, make_pages, normal, widths
from benchmarks.gpu.report import Report
from benchmarks.gpu.suite import Setting
from benchmarks.gpu.timing import Call, Timing, rotate, time_variants
from persimmon.kernels import sampling, truncation
from persimmon.kernels.chunk_plan import plan_chunks
from persimmon.kernels.decode_attention import DecodeConfig
from persimmon.kernels.decode_work import build_work_list
from persimmon.kernels.fused import SMALL_STEP, SPARSE_STEP
from persimmon.kernels.head import sample_head
from persimmon.kernels.layer_norm import bias_relu_squared_, embed, layer_norm
from persimmon.kernels.operands import DrawInputs, TruncationInputs
from persimmon.kernels.prefill_attention import prefill_attention, qk_norm_rotary_store


def run(setting: Setting, report: Report) -> None:
    """The decode step's kernels first, in the order of the targets."""
    suite = setting.suite
    down = next(width for width in widths(suite.config) if width.name == "mlp_down")
    for batch, context in suite.decode_grid:
        what = f"decode attention, {batch} x {context}"
        report.attempt(what, partial(_decode_attention, setting, report, batch, context))
    for rows in suite.rows:
        for width in widths(suite.config):
            report.attempt(f"{width.name}, {rows} rows", partial(_projection, setting, report, width, rows))
        for zeros in suite.zero_fractions if rows <= SPARSE_STEP else ():
            what = f"skipped rows, {rows} rows, {zeros} zeros"
            report.attempt(what, partial(_skipped_rows, setting, report, down, rows, zeros))
    for start, count in suite.chunk_grid:
        what = f"prompt attention, {count} after {start}"
        report.attempt(what, partial(_prompt_attention, setting, report, start, count))
    for rows in suite.sample_rows:
        report.attempt(f"sampling, {rows} rows", partial(_sampling, setting, report, rows))
    report.attempt("elementwise", partial(_elementwise, setting, report))
    report.attempt("work list", partial(_work_list, setting, report))


def memory_columns(timing: Timing, moved: int, ceiling: float | None) -> dict[str, object]:
    """Columns of a row about a kernel that waits for memory."""
    rate = moved / timing.seconds
    return {**timing.columns, "mb": moved / 1e6, "gb_s": rate / 1e9, "of_copy": rate / ceiling if ceiling else None}


def _decode_attention(setting: Setting, report: Report, batch: int, context: int) -> None:
    suite, ceiling = setting.suite, report.figures().get(targets.COPY)
    case = DecodeCase(setting=setting, batch=batch, context=context, block_size=suite.block_size)
    timed = time_variants(
        {"ours": case.calls(DecodeConfig()), "torch": case.dense_calls(batch, context)},
        setting.device,
        suite.seconds_per_figure,
    )
    columns = memory_columns(timed["ours"], case.moved, ceiling)
    report.row(
        "decode attention",
        batch=batch,
        context=context,
        **columns,
        predicted_us=predictions.predicted_us(setting, batch, predictions.ATTENTION, context),
        dense_torch_us=timed["torch"].median,
    )
    if (batch, context) == (64, 512) and ceiling:
        about = f"{timed['ours'].median:.0f} us a layer"
        report.figure(targets.DECODE_ATTENTION, case.moved / timed["ours"].seconds / ceiling, about)


def _work_list(setting: Setting, report: Report) -> None:
    """The one launch of a step that all layers' attention shares."""
    batch, context = setting.suite.decode_grid[-1]
    case = DecodeCase(setting=setting, batch=batch, context=context, block_size=setting.suite.block_size)
    work_list = {"work list": [partial(build_work_list, case.lengths, case.workspace)]}
    timed = time_variants(work_list, setting.device, setting.suite.seconds_per_figure)
    report.row("work list", batch=batch, context=context, **timed["work list"].columns)


def _projection(setting: Setting, report: Report, width: Width, rows: int) -> None:
    case = ProjectionCase(setting, width, rows)
    timed = time_variants(
        {"ours": case.calls(case.default), "cuBLAS": case.cublas_calls()},
        setting.device,
        setting.suite.seconds_per_figure,
    )
    columns = memory_columns(timed["ours"], case.moved, report.figures().get(targets.COPY))
    report.row(
        "projections",
        name=width.name,
        rows=rows,
        **columns,
        predicted_us=predictions.predicted_us(setting, rows, predictions.LAUNCHES[width.name]),
        cublas_us=timed["cuBLAS"].median,
    )


def _skipped_rows(setting: Setting, report: Report, down: Width, rows: int, zeros: float) -> None:
    """The down projection, skipping weight rows that meet only zeros; each token's zeros are in other places."""
    case = ProjectionCase(setting, down, rows, zeros=zeros)
    timed = time_variants(
        {"skipping": case.calls(case.default, skipping=True), "dense": case.calls(case.default)},
        setting.device,
        setting.suite.seconds_per_figure / 2,
    )
    columns = memory_columns(timed["skipping"], case.moved_when_skipping, report.figures().get(targets.COPY))
    unread = 1 - case.alive.float().mean().item()
    predicted = predictions.predicted_us(setting, rows, predictions.DOWN_AT_90_PERCENT_ZEROS)
    report.row(
        "skipped rows",
        rows=rows,
        zeros=zeros,
        unread=unread,
        **columns,
        predicted_us=predicted if zeros == 0.9 else None,
        dense_us=timed["dense"].median,
    )


def prompt_attention_flops(setting: Setting, start: int, count: int) -> int:
    """Of one layer: two products over the keys that each query sees."""
    return 4 * setting.suite.config.hidden_size * (count * start + count * (count + 1) // 2)


def _prompt_attention(setting: Setting, report: Report, start: int, count: int) -> None:
    suite, config, ceiling = setting.suite, setting.suite.config, report.figures().get(targets.MATMUL)
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
                *inputs.norm_and_rotary,
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


def _elementwise(setting: Setting, report: Report) -> None:
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
    ceiling = report.figures().get(targets.COPY)
    timed = time_variants({name: own for name, (own, _) in calls.items()}, setting.device, suite.seconds_per_figure)
    for name, timing in timed.items():
        report.row("elementwise", what=name, rows=rows, **memory_columns(timing, calls[name][1], ceiling))


def _sampling(setting: Setting, report: Report, rows: int) -> None:
    """The output projection with and without its draw, and draws from existing logits."""
    config, generator, device = setting.suite.config, setting.generator(), setting.device
    vocab_size, ceiling = config.vocab_size, report.figures().get(targets.COPY)
    weight = normal(generator, vocab_size, config.hidden_size, dtype=DTYPE, deviation=0.03)
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
        "top-k 50, top-p 0.9": [partial(truncation.sample_truncated, logits, draw, truncate, live, workspace, search)],
    }
    if rows <= SMALL_STEP:
        for name, how in (("greedy", greedy), ("temperature", draw)):
            fused = partial(sample_head, hidden, weight, how, live, workspace)
            variants[f"projection and {name}"] = [fused]
    logits.copy_(alone())
    timed = time_variants(variants, device, setting.suite.seconds_per_figure)
    moved = {name: weight.nbytes for name in variants if "projection" in name} | {"draw from logits": logits.nbytes}
    for name, timing in timed.items():
        columns = memory_columns(timing, moved[name], ceiling) if name in moved else timing.columns
        report.row("sampling" if name in moved else "truncation", what=name, rows=rows, **columns)
