"""Is attention right?  Of single tokens and of prompt chunks, over pages whose unwritten rows are NaN."""

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks.gpu.compare import FLOAT32_UNIT, check_launches, check_same, compare, rounded, unit
from benchmarks.gpu.inputs import AttentionInputs, Pages, make_attention_inputs, make_pages
from benchmarks.gpu.report import Report
from benchmarks.gpu.suite import Setting
from persimmon.kernels.chunk_plan import plan_chunks
from persimmon.kernels.decode_attention import DecodeConfig, decode_attention
from persimmon.kernels.decode_work import DecodeWorkspace, build_work_list
from persimmon.kernels.operands import LayerCache
from persimmon.kernels.prefill_attention import prefill_attention, qk_norm_rotary_store
from persimmon.kernels.reference_decode_attention import decode_attention as exact_decode_attention

ATTENTION_SPREAD = 128 * FLOAT32_UNIT
"""What float32 scores and exponentials put into a weighted mean, as a share of the weighted mean of magnitudes."""


def check_lengths(setting: Setting) -> list[int]:
    """The contexts of the largest batch."""
    suite, dice = setting.suite, random.Random(setting.seed)
    longest = min(max(suite.check_lengths), 600)
    lengths = [*suite.check_lengths]
    lengths += [dice.randint(1, longest) for _ in range(suite.check_batch - len(lengths))]
    dice.shuffle(lengths)
    return lengths


class _Decode:
    """A batch of decode attention; every run begins from the same cache."""

    def __init__(self, setting: Setting, dtype: torch.dtype, block_size: int) -> None:
        generator, config = setting.generator(), setting.suite.config
        self.lengths = check_lengths(setting)
        self.inputs: AttentionInputs = make_attention_inputs(config, len(self.lengths), dtype, generator)
        filled = [length - 1 for length in self.lengths]
        self.pages: Pages = make_pages(config, self.lengths, block_size, dtype, generator, poisoned=True, filled=filled)
        self.workspace = DecodeWorkspace.allocate(
            setting.suite.max_num_seqs,
            setting.suite.max_model_len,
            config.num_attention_heads,
            config.head_dim,
            setting.device,
        )

    def tensors(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        qkv, device = self.inputs.qkv, self.inputs.qkv.device
        lengths = torch.tensor([self.lengths[row] for row in rows], dtype=torch.int32, device=device)
        return qkv[torch.tensor(rows, device=device)], lengths, self.pages.table_tensor(rows)

    def run(
        self,
        rows: Sequence[int] | None = None,
        *,
        pdl: bool = False,
        config: DecodeConfig | None = None,
        shuffled: bool = False,
    ) -> torch.Tensor:
        qkv, lengths, tables = self.tensors(range(len(self.lengths)) if rows is None else rows)
        build_work_list(lengths, self.workspace, pdl=pdl)
        if shuffled:
            self._shuffle()
        inputs = self.inputs
        return decode_attention(
            qkv,
            *inputs.norm_and_rotary,
            self.pages.cache,
            lengths,
            tables,
            self.workspace,
            config=config or DecodeConfig(),
            pdl=pdl,
        )

    def _shuffle(self) -> None:
        items = int(self.workspace.num_items)
        order = torch.randperm(items, device=self.workspace.num_items.device)
        for listed in (self.workspace.item_sequences, self.workspace.item_splits):
            listed[:items] = listed[:items][order]

    def exact(self, pages: Pages) -> tuple[torch.Tensor, torch.Tensor]:
        """The exact output, and the weighted mean of the values' magnitudes; writes the new rows into `pages`."""
        qkv, lengths, tables = self.tensors(range(len(self.lengths)))
        inputs = self.inputs

        def attend(double_qkv: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            return exact_decode_attention(
                double_qkv,
                *inputs.norm_and_rotary,
                LayerCache(pages.keys, values),
                lengths,
                tables,
                inside=torch.float64,
            )

        magnitudes = qkv.double()
        magnitudes[:, :, 2].abs_()
        return attend(qkv.double(), pages.values), attend(magnitudes, pages.values.abs())


def check_decode_attention(setting: Setting, report: Report, dtype: torch.dtype, name: str, block_size: int) -> None:
    title = f"decode attention, {name}"
    decode = _Decode(setting, dtype, block_size)
    before = decode.pages.clone()
    out = decode.run()
    expected = before.clone()
    exact, magnitude = decode.exact(expected)
    spread = magnitude * (unit(dtype) + ATTENTION_SPREAD)
    compare(report, title, out, exact, rounded(exact, dtype, spread))
    _check_stored(report, title, decode.pages, expected, dtype)
    report.check(f"{title}: counters are back at zero", not bool(decode.workspace.arrivals.any()))
    rows = [0, decode.lengths.index(max(decode.lengths)), len(decode.lengths) - 1]
    alone = [decode.run([row])[0] for row in rows]
    check_same(report, f"{title}: a row alone = in a batch of {len(out)}", alone, [out[row] for row in rows])
    order = random.Random(setting.seed).sample(range(len(out)), len(out))
    check_same(
        report, f"{title}: rows in another order", [decode.run(order)], [out[torch.tensor(order, device=out.device)]]
    )
    check_same(report, f"{title}: items in another order", [decode.run(shuffled=True)], [out])
    if block_size == setting.suite.block_size and dtype == torch.float16:
        few = DecodeConfig(programs_per_sm=1)
        check_same(report, f"{title}: fewer programs", [decode.run(config=few)], [out])
        # A captured call holds no transfer from the host, so its inputs are made before.
        held, inputs = decode.tensors(range(len(out))), decode.inputs

        def launch(pdl: bool) -> Sequence[torch.Tensor]:
            build_work_list(held[1], decode.workspace, pdl=pdl)
            return [
                decode_attention(
                    held[0],
                    *inputs.norm_and_rotary,
                    decode.pages.cache,
                    held[1],
                    held[2],
                    decode.workspace,
                    pdl=pdl,
                )
            ]

        check_launches(setting, report, title, launch)


def _check_stored(report: Report, title: str, pages: Pages, expected: Pages, dtype: torch.dtype) -> None:
    """New rows are there, and nothing else has changed; keys may be rounded to the other side."""
    check_same(report, f"{title}: values as stored", [pages.values], [expected.values])
    keys, wanted = pages.keys, expected.keys
    close = (keys.double() - wanted.double()).abs() <= 2.01 * unit(dtype) * wanted.double().abs() + 4e-6
    both_nan = keys.isnan() & wanted.isnan()
    changed = (keys != wanted) & ~both_nan
    report.check(f"{title}: keys as stored", bool((close | both_nan).all()), rounded_otherwise=int(changed.sum()))


def check_prompt_attention(setting: Setting, report: Report, dtype: torch.dtype, name: str) -> None:
    config, generator, title = setting.suite.config, setting.generator(), f"prompt attention, {name}"
    starts, counts = ([chunk[which] for chunk in setting.suite.check_chunks] for which in (0, 1))
    inputs = make_attention_inputs(config, sum(counts), dtype, generator)
    ends = [start + count for start, count in setting.suite.check_chunks]
    block_size = setting.suite.block_size
    pages = make_pages(config, ends, block_size, dtype, generator, poisoned=True, filled=starts)
    plan = plan_chunks(pages.tables, starts, counts, block_size=block_size, device=setting.device, dtype=dtype)

    def call(pdl: bool) -> Sequence[torch.Tensor]:
        q = qk_norm_rotary_store(
            inputs.qkv,
            *inputs.norm_and_rotary,
            pages.cache,
            plan,
            pdl=pdl,
        )
        return q, prefill_attention(q, pages.cache, plan, pdl=pdl)

    q, out = call(False)
    first = 0
    for index, (start, count) in enumerate(setting.suite.check_chunks):
        part = slice(first, first + count)
        _check_chunk(report, f"{title}, {count} after {start}", inputs, pages, pages.tables[index], q, out, part, start)
        first += count
    if dtype == torch.float16:
        check_launches(setting, report, title, call, repeats=max(2, setting.suite.check_repeats // 10))
    longest = max(range(len(counts)), key=lambda index: counts[index])
    at = sum(counts[:longest])
    alone = plan_chunks(
        [pages.tables[longest]],
        [starts[longest]],
        [counts[longest]],
        block_size=block_size,
        device=setting.device,
        dtype=dtype,
    )
    own = prefill_attention(q[at : at + counts[longest]].contiguous(), pages.cache, alone)
    check_same(report, f"{title}: a chunk alone", [own], [out[at : at + counts[longest]]])


def _check_chunk(
    report: Report,
    title: str,
    inputs: AttentionInputs,
    pages: Pages,
    table: Sequence[int],
    q: torch.Tensor,
    out: torch.Tensor,
    part: slice,
    start: int,
) -> None:
    """One chunk against exact arithmetic, some of its heads, with the keys and values that lie in the cache."""
    count, (_, heads, dim), dtype = part.stop - part.start, q.shape, q.dtype
    chosen = torch.tensor(sorted({0, 1, heads // 2, heads - 1}), device=q.device)
    positions = torch.arange(start, start + count, device=q.device)
    given = inputs.qkv[part].double()
    turned = F.layer_norm(given[:, :, :2], (dim,), eps=inputs.eps)
    turned = turned * inputs.norm_weight.double() + inputs.norm_bias.double()
    cos, sin = (angles[positions].double()[:, None, None] for angles in (inputs.rotary.cos, inputs.rotary.sin))
    left, right, rest = turned.tensor_split((cos.shape[-1], 2 * cos.shape[-1]), dim=-1)
    turned = torch.cat((left * cos - right * sin, right * cos + left * sin, rest), dim=-1)
    blocks = torch.tensor(table, device=q.device)
    keys, values = (
        cache[blocks].transpose(0, 1).reshape(heads, -1, dim)[:, : start + count]
        for cache in (pages.keys, pages.values)
    )
    spread = 64 * FLOAT32_UNIT * (1 + turned.abs())
    compare(report, f"{title}: queries", q[part], turned[:, :, 0], rounded(turned[:, :, 0], dtype, spread[:, :, 0]))
    stored = keys[:, start:].transpose(0, 1)
    compare(report, f"{title}: keys", stored, turned[:, :, 1], rounded(turned[:, :, 1], dtype, spread[:, :, 1]))
    check_same(report, f"{title}: values", [values[:, start:].transpose(0, 1)], [inputs.qkv[part][:, :, 2]])
    scores = torch.einsum("thd,hkd->htk", q[part][:, chosen].double(), keys[chosen].double()) / dim**0.5
    visible = torch.arange(start + count, device=q.device) <= positions[:, None]
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    exact, magnitude = (
        torch.einsum("htk,hkd->thd", weights, x) for x in (values[chosen].double(), values[chosen].double().abs())
    )
    spread = magnitude * (2 * unit(dtype) + ATTENTION_SPREAD)
    compare(report, title, out[part].view(count, heads, dim)[:, chosen], exact, rounded(exact, dtype, spread))
