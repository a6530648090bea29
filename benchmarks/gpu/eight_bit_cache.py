"""Attention over a KV cache of 8 bits: right first, then how fast, next to what memory allows.

What is stored is compared bit for bit with plain torch's rounding on the same card.
"""

from functools import partial

import torch

from benchmarks.gpu import predictions, targets
from benchmarks.gpu.cases import DTYPE
from benchmarks.gpu.checks_attention import ATTENTION_SPREAD, check_lengths
from benchmarks.gpu.compare import check_same, compare, rounded, unit
from benchmarks.gpu.inputs import AttentionInputs, Pages, make_attention_inputs, make_pages
from benchmarks.gpu.report import Report
from benchmarks.gpu.speed import memory_columns
from benchmarks.gpu.suite import Setting
from benchmarks.gpu.timing import Call, time_variants
from persimmon.kernels.cache_types import EIGHT_BIT_CACHES, allocate_layer, row_bytes
from persimmon.kernels.chunk_plan import plan_chunks
from persimmon.kernels.decode_attention import decode_attention
from persimmon.kernels.decode_work import DecodeWorkspace, build_work_list
from persimmon.kernels.fused import FusedKernels
from persimmon.kernels.operands import LayerCache
from persimmon.kernels.prefill_attention import prefill_attention, qk_norm_rotary_store
from persimmon.kernels.reference_cache import gather_tiles, store_rows
from persimmon.kernels.reference_decode_attention import decode_attention as exact_decode_attention


def run(setting: Setting, report: Report) -> None:
    """Checks of the types that the card has, then times."""
    report.note(f"seed {setting.seed}")
    offered = FusedKernels(setting.device).cache_dtypes(DTYPE)
    names = {name: dtype for name, dtype in EIGHT_BIT_CACHES.items() if dtype in offered}
    for name, dtype in names.items():
        report.attempt(
            f"decode attention, {name}: right", partial(_check_decode, setting, report, name, dtype), seconds=6
        )
        report.attempt(
            f"prompt attention, {name}: right", partial(_check_chunks, setting, report, name, dtype), seconds=6
        )
    for batch, context in setting.suite.decode_grid:
        for name, dtype in names.items():
            what = f"decode attention, {name}, {batch} x {context}"
            report.attempt(what, partial(_time, setting, report, name, dtype, batch, context), seconds=4)


def _stored(pages: Pages, dtype: torch.dtype) -> LayerCache:
    """The pages' rows in a cache of another type."""
    (blocks, heads, size, dim), device = pages.keys.shape, pages.keys.device
    empty = partial(torch.zeros, device=device)
    cache = allocate_layer((blocks, heads, size, dim), dtype, lambda shape, dtype: empty(shape, dtype=dtype))
    rows = torch.arange(blocks * heads * size, device=device)
    store_rows(cache, rows, pages.keys.view(-1, dim), pages.values.view(-1, dim))
    return cache


def _copy(cache: LayerCache) -> LayerCache:
    return LayerCache(*(tensor.clone() for tensor in cache.tensors))


class _Decode:
    """A batch over one cache."""

    def __init__(self, setting: Setting, dtype: torch.dtype, lengths: list[int]) -> None:
        config, generator = setting.suite.config, setting.generator()
        self.inputs: AttentionInputs = make_attention_inputs(config, len(lengths), DTYPE, generator)
        pages = make_pages(config, lengths, setting.suite.block_size, DTYPE, generator)
        self.cache, self.tables = _stored(pages, dtype), pages.table_tensor()
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=setting.device)
        heads, dim = config.num_attention_heads, config.head_dim
        self.workspace = DecodeWorkspace.allocate(len(lengths), max(lengths), heads, dim, setting.device)
        build_work_list(self.lengths, self.workspace)

    def run(self, cache: LayerCache) -> torch.Tensor:
        inputs = self.inputs
        return decode_attention(
            inputs.qkv,
            *inputs.norm_and_rotary,
            cache,
            self.lengths,
            self.tables,
            self.workspace,
        )

    def exact(self, cache: LayerCache) -> torch.Tensor:
        inputs = self.inputs
        return exact_decode_attention(
            inputs.qkv.double(),
            *inputs.norm_and_rotary,
            cache,
            self.lengths,
            self.tables,
            inside=torch.float64,
        )


def _check_decode(setting: Setting, report: Report, name: str, dtype: torch.dtype) -> None:
    case, title = _Decode(setting, dtype, check_lengths(setting)), f"decode attention, {name}"
    own, other = _copy(case.cache), _copy(case.cache)
    out, exact = case.run(own), case.exact(other)
    # A key whose number the last bit of its norm decides about may differ by one step, 1/8 in fp8.
    step = 0.004 if dtype == torch.int8 else 0.02
    compare(report, title, out, exact, rounded(exact, DTYPE, unit(DTYPE) + ATTENTION_SPREAD + step))
    check_same(report, f"{title}: values as stored", [own.values.view(torch.uint8)], [other.values.view(torch.uint8)])
    check_same(report, f"{title}: again", [case.run(_copy(case.cache))], [out])


def _check_chunks(setting: Setting, report: Report, name: str, dtype: torch.dtype) -> None:
    config, title = setting.suite.config, f"prompt attention, {name}"
    heads, dim = config.num_attention_heads, config.head_dim
    start, count = max(setting.suite.check_chunks, key=lambda chunk: chunk[1])
    generator = setting.generator()
    inputs = make_attention_inputs(config, count, DTYPE, generator)
    pages = make_pages(config, [start + count], setting.suite.block_size, DTYPE, generator)
    cache = _stored(pages, dtype)

    def attend(first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        plan = plan_chunks(
            pages.tables,
            [start + first],
            [end - first],
            block_size=setting.suite.block_size,
            device=setting.device,
            dtype=dtype,
        )
        q = qk_norm_rotary_store(
            inputs.qkv[first:end],
            *inputs.norm_and_rotary,
            cache,
            plan,
        )
        return q, prefill_attention(q, cache, plan)

    q, out = attend(0, count)
    every_head = torch.arange(heads, device=setting.device)[:, None]
    tiles = torch.tensor(pages.tables[0], device=setting.device) * heads + every_head
    keys, values = (rows[:, : start + count].double() for rows in gather_tiles(cache, tiles.reshape(-1), heads))
    positions = torch.arange(start + count, device=setting.device)
    visible = positions <= positions[start:, None]
    scores = torch.einsum("thd,hkd->htk", q.double(), keys) / dim**0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    exact, magnitude = (torch.einsum("htk,hkd->thd", weights, x).reshape(count, -1) for x in (values, values.abs()))
    # Keys and values are rounded to the network's type once more, and so are weights.
    compare(report, title, out, exact, rounded(exact, DTYPE, magnitude * (6 * unit(DTYPE) + ATTENTION_SPREAD)))
    half = count // 2
    if half > 16:  # the same tile shape
        parts = torch.cat((attend(0, half)[1], attend(half, count)[1]))
        check_same(report, f"{title}: in two chunks", [parts], [out])


def _time(setting: Setting, report: Report, name: str, dtype: torch.dtype, batch: int, context: int) -> None:
    config, case = setting.suite.config, _Decode(setting, dtype, [context] * batch)
    calls: list[Call] = [partial(case.run, case.cache)]
    timed = time_variants({name: calls}, setting.device, setting.suite.seconds_per_figure)
    moved = 2 * batch * context * config.num_attention_heads * row_bytes(dtype, config.head_dim)
    columns = memory_columns(timed[name], moved, report.figures().get(targets.COPY))
    predicted = predictions.predicted_cache_us(setting, name, batch, context)
    report.row("8-bit cache", cache=name, batch=batch, context=context, **columns, predicted_us=predicted)
