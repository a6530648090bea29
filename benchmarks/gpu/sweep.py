"""Would other launch settings be faster? Each kernel's default next to the best of its neighbours.

The settings that may change a result's bits, the splits, are swept too: they are the network's to choose once.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import product

from triton.runtime.errors import OutOfResources

from benchmarks.gpu.inputs import make_attention_inputs, make_pages, widths
from benchmarks.gpu.report import Report
from benchmarks.gpu.speed import DTYPE, DecodeCase, ProjectionCase
from benchmarks.gpu.suite import Setting
from benchmarks.gpu.timing import Call, time_variants
from persimmon.kernels.chunk_plan import CONFIGS, PrefillConfig, plan_chunks
from persimmon.kernels.decode_attention import DecodeConfig
from persimmon.kernels.prefill_attention import prefill_attention
from persimmon.kernels.projection_config import ProjectionConfig

SHOWN = 4
"""How many of the best settings are listed."""


def run(setting: Setting, report: Report) -> None:
    """Every kernel whose launch can be set."""
    for block_size in (16, 32, 64) if setting.on_gpu else (setting.suite.block_size,):
        for batch, context in ((64, 512), (1, 8192)) if setting.on_gpu else setting.suite.decode_grid[:1]:
            with report.attempt(f"decode attention, blocks of {block_size}, {batch} x {context}"):
                case = DecodeCase(setting, batch, context, block_size)
                _try(
                    setting,
                    report,
                    f"decode attention, blocks of {block_size}, {batch} x {context}",
                    {str(config): case.calls(config) for config in _decode_configs(setting)},
                    str(DecodeConfig()),
                )
    for width in widths(setting.suite.config):
        for rows in setting.suite.sweep_rows:
            with report.attempt(f"{width.name}, {rows} rows"):
                projection = ProjectionCase(setting, width, rows, zeros=0.9)
                configs = _projection_configs(setting, projection.default)
                skipping = projection.is_down and rows <= 16
                _try(
                    setting,
                    report,
                    f"{width.name}, {rows} rows",
                    {str(config): projection.calls(config, skipping=skipping) for config in configs},
                    str(projection.default),
                )
    with report.attempt("prompt attention"):
        _prompt_attention(setting, report)


def _try(setting: Setting, report: Report, kernel: str, variants: dict[str, list[Call]], default: str) -> None:
    """Times all settings; some want more of a multiprocessor than it has."""
    times: dict[str, float] = {}
    for name, calls in variants.items():
        with report.attempt(f"{kernel}: {name}"):
            try:
                timed = time_variants({name: calls}, setting.device, setting.suite.seconds_per_figure / 4)
            except OutOfResources as error:
                report.note(f"{kernel}: {name}: {error}")
                continue
            times[name] = timed[name].median
    best = sorted(times, key=times.__getitem__)[:SHOWN]
    for name in dict.fromkeys([default, *best]):
        if name in times:
            report.row(
                "settings", kernel=kernel, us=times[name], gain=times.get(default, 0.0) / times[name], setting=name
            )


def _decode_configs(setting: Setting) -> Iterable[DecodeConfig]:
    default = DecodeConfig()
    if not setting.on_gpu:
        return [default, replace(default, programs_per_sm=1)]
    grid = product((1, 2, 4), (3, 4, 5), (4, 8, 16))
    return [DecodeConfig(warps=warps, stages=stages, programs_per_sm=programs) for warps, stages, programs in grid]


def _projection_configs(setting: Setting, default: ProjectionConfig) -> Iterable[ProjectionConfig]:
    """The default and its neighbours; few, because each is compiled."""
    if not setting.on_gpu:
        return [default, replace(default, splits=default.splits + 1)]
    changed = [replace(default, splits=splits) for splits in (1, 2, 4, 8)]
    changed += [replace(default, block_k=block_k, stages=stages) for block_k, stages in ((64, 6), (128, 3), (128, 6))]
    changed += [replace(default, block_n=128), replace(default, block_n_many=64)]
    changed += [replace(default, warps=8), replace(default, norm_in_prologue=False)]
    return list(dict.fromkeys([default, *changed]))


def _prompt_attention(setting: Setting, report: Report) -> None:
    suite, config, generator = setting.suite, setting.suite.config, setting.generator()
    count = suite.chunk
    inputs = make_attention_inputs(config, count, DTYPE, generator)
    pages = make_pages(config, [2 * count], suite.block_size, DTYPE, generator)
    q = inputs.qkv[:, :, 0].clone()
    default = CONFIGS[-1]
    tried = [default]
    if setting.on_gpu:
        grid = product((64, 128), (64, 128), (4, 8), (2, 3))
        tried += [PrefillConfig(*sizes) for sizes in grid if PrefillConfig(*sizes) != default]
    variants: dict[str, list[Call]] = {}
    for candidate in tried:
        plan = plan_chunks(
            pages.tables, [count], [count], block_size=suite.block_size, device=setting.device, configs=[candidate]
        )
        variants[str(candidate)] = [partial(prefill_attention, q, pages.cache, plan)]
    _try(setting, report, f"prompt attention, {count} after {count}", variants, str(default))
