"""Would other launch settings be faster?  Each kernel's default next to its neighbours.

The settings are those of the kernels' own configurations, one changed at a time, and a few changed together.  Splits,
which may change a result's bits, are swept too: they are the network's to choose once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from benchmarks.gpu.cases import DTYPE, DecodeCase, ProjectionCase
from benchmarks.gpu.inputs import make_attention_inputs, make_pages, widths
from benchmarks.gpu.report import Report
from benchmarks.gpu.suite import Setting, Suite
from benchmarks.gpu.timing import Call, time_variants
from persimmon.kernels.chunk_plan import CONFIGS, PrefillConfig, plan_chunks
from persimmon.kernels.decode_attention import DecodeConfig
from persimmon.kernels.fused import SPARSE_STEP
from persimmon.kernels.launch import max_shared_bytes, next_power_of_2
from persimmon.kernels.prefill_attention import prefill_attention
from persimmon.kernels.projection_config import ATTENTION_OUT, MLP_DOWN, WIDE, ProjectionConfig

SHOWN = 4
"""How many of the best settings are listed."""

TRIED: dict[str, tuple[Any, ...]] = {
    "block_n": (64, 128),
    "block_n_many": (64, 128),
    "block_k": (64, 128),
    "block_queries": (64, 128),
    "block_keys": (64, 128),
    "splits": (1, 2, 4, 8),
    "stages": (3, 4, 5, 6, 7),
    "warps": (4, 8),
}
"""Values of a configuration's fields; a field that is not here and is either true or false is tried both ways."""

TOGETHER: tuple[dict[str, Any], ...] = (
    {"block_n": 128, "splits": 2},
    {"block_n": 128, "splits": 2, "block_k": 64},
    {"block_n_many": 64, "stages": 6},
    {"splits": 8, "stages": 3},
)
"""Fields that are changed together: wider tiles halve the reads of rows, more splits keep all multiprocessors busy."""


def neighbours(default: Any, together: Sequence[Mapping[str, Any]] = ()) -> list[Any]:
    """A configuration, and those that differ from it in one field or in one of the given groups of fields.

    Args:
        default: a frozen dataclass.
        together: fields to change together; groups with a field that it does not have are left out.

    Returns:
        Different configurations, the default first; those that it refuses are left out.
    """
    names = [field.name for field in fields(default)]
    changes: list[Mapping[str, Any]] = [own for own in together if set(own) <= set(names)]
    for name in names:
        value = getattr(default, name)
        changes += [{name: other} for other in ((not value,) if isinstance(value, bool) else TRIED.get(name, ()))]
    return list(dict.fromkeys([default, *_made(default, changes)]))


def _made(default: Any, changes: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    for change in changes:
        try:
            yield replace(default, **change)
        except ValueError:
            continue


@dataclass(frozen=True, slots=True)
class ProjectionSweep:
    """One projection whose settings are tried.

    Attributes:
        name: of the projection.
        rows: tokens.
        default: how the network launches it.
        skipping: whether rows of its weight that meet only zeros are not read.
        shared_bytes: that a program may take on the card.
    """

    name: str
    rows: int
    default: ProjectionConfig
    skipping: bool
    shared_bytes: int

    @property
    def configs(self) -> list[ProjectionConfig]:
        """What is tried: the default first, and of those that come to the same with this many rows only one."""
        block_m = max(16, next_power_of_2(self.rows))
        different: dict[tuple[object, ...], ProjectionConfig] = {}
        for config in neighbours(self.default, TOGETHER):
            prologue = config.norm_in_prologue and block_m == 16
            same = (config.tiling(block_m, DTYPE.itemsize, self.shared_bytes), config.splits, config.warps, prologue)
            different.setdefault(same, config)
        return list(different.values())

    def __str__(self) -> str:
        return f"{self.name}, {self.rows} rows{', 90% zeros' if self.skipping else ''}"


def projection_sweeps(suite: Suite, shared_bytes: int) -> list[ProjectionSweep]:
    """The projections whose defaults were chosen by arithmetic, the ones furthest from their roofline first."""
    defaults = {"attention_out": ATTENTION_OUT, "mlp_down": MLP_DOWN}
    sweeps = []
    for rows in suite.sweep_rows:
        for width in widths(suite.config):
            skipping = width.name == "mlp_down" and rows <= SPARSE_STEP
            sweeps.append(
                ProjectionSweep(
                    name=width.name,
                    rows=rows,
                    default=defaults.get(width.name, WIDE),
                    skipping=skipping,
                    shared_bytes=shared_bytes,
                )
            )
    return sorted(sweeps, key=lambda sweep: not sweep.skipping)


def run(setting: Setting, report: Report) -> None:
    """Projections, then attention."""
    suite = setting.suite
    for sweep in projection_sweeps(suite, max_shared_bytes(setting.device)):
        report.attempt(str(sweep), partial(_projection, setting, report, sweep), seconds=5)
    for batch, context in suite.decode_grid[:2]:
        what = f"decode attention, {batch} x {context}"
        report.attempt(what, partial(_decode_attention, setting, report, batch, context), seconds=5)
    report.attempt("prompt attention", partial(_prompt_attention, setting, report), seconds=5)


def _projection(setting: Setting, report: Report, sweep: ProjectionSweep) -> None:
    width = next(width for width in widths(setting.suite.config) if width.name == sweep.name)
    case = ProjectionCase(setting, width, sweep.rows, zeros=0.9)
    # In the interpreter nothing is compared; two show that the code runs.
    configs = sweep.configs if setting.on_gpu else sweep.configs[:2]
    variants = {str(config): case.calls(config, skipping=sweep.skipping) for config in configs}
    _try(setting, report, str(sweep), variants)


def _try(setting: Setting, report: Report, kernel: str, variants: dict[str, list[Call]]) -> None:
    """Times all settings, the default first; some want more of a multiprocessor than it has."""
    times: dict[str, float] = {}
    for name, calls in variants.items():
        try:
            timed = time_variants({name: calls}, setting.device, setting.suite.seconds_per_figure / 4)
        except (OutOfResources, CompilationError) as error:
            report.note(f"{kernel}: {name}: {str(error).splitlines()[0]}")
            continue
        times[name] = timed[name].median
    default = next(iter(variants))
    for name in dict.fromkeys([default, *sorted(times, key=times.__getitem__)[:SHOWN]]):
        if name in times:
            gain = times[default] / times[name] if default in times else None
            report.row("settings", kernel=kernel, us=times[name], gain=gain, setting=name)


def _decode_attention(setting: Setting, report: Report, batch: int, context: int) -> None:
    case = DecodeCase(setting=setting, batch=batch, context=context, block_size=setting.suite.block_size)
    together = [{"programs_per_sm": programs} for programs in (1, 4, 8, 16)]
    configs = neighbours(DecodeConfig(), together)
    variants = {str(config): case.calls(config) for config in (configs if setting.on_gpu else configs[:2])}
    _try(setting, report, f"decode attention, {batch} x {context}", variants)


def _prompt_attention(setting: Setting, report: Report) -> None:
    suite, config, generator = setting.suite, setting.suite.config, setting.generator()
    count = suite.chunk
    inputs = make_attention_inputs(config, count, DTYPE, generator)
    pages = make_pages(config, [2 * count], suite.block_size, DTYPE, generator)
    q = inputs.qkv[:, :, 0].clone()
    tried: list[PrefillConfig] = neighbours(CONFIGS[-1], [{"block_queries": 64, "warps": 4}])
    variants: dict[str, list[Call]] = {}
    for candidate in tried if setting.on_gpu else tried[:1]:
        plan = plan_chunks(
            pages.tables, [count], [count], block_size=suite.block_size, device=setting.device, configs=[candidate]
        )
        variants[str(candidate)] = [partial(prefill_attention, q, pages.cache, plan)]
    _try(setting, report, f"prompt attention, {count} after {count}", variants)
